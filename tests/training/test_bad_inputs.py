"""Trainings that have diverged, and models that do not fit: never a sparse network that is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import Method, Pruner, Target
from secateur.errors import RecipeError, SecateurError, SelectionError, TargetError, WeightError
from secateur.penalties import L1, Chauvin, Growing, Penalised, PenalisedActivity
from secateur.schedules import cubic, linear
from secateur.training import L0, PARAMETRISATIONS, Movement, Reparametrised, RigL, SparseTraining
from tests.cases import CASES, Case

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", CASES["parametrisation"], ids=str)
def test_weights_that_have_diverged_are_no_sparse_network(case: Case, value: float) -> None:
    """NaN is neither above a threshold nor below one; a mask that reads it as pruned would hide it behind a zero."""
    model = network()
    wrapped = Reparametrised(model, PARAMETRISATIONS[case.name](**case.kwargs))
    with torch.no_grad():
        model[2].weight[1, 2] = value
    refuses(wrapped, "2.weight")
    if case.name != "sr_ste":  # ranks the weights, and refuses at once
        assert not bool(torch.isfinite(wrapped.eval()(X)).all())


@pytest.mark.parametrize("case", [c for c in CASES["parametrisation"] if c.name != "sr_ste"], ids=str)
def test_latents_that_have_diverged_are_no_sparse_network(case: Case) -> None:
    wrapped = Reparametrised(network(), PARAMETRISATIONS[case.name](**case.kwargs))
    with torch.no_grad():
        wrapped.latents["2/weight"].view(-1)[0] = torch.nan
    refuses(wrapped, "the latent of 2.weight is NaN: training has diverged")


def refuses(wrapped: Reparametrised, match: str) -> None:
    before = copy.deepcopy(wrapped.state_dict())
    with pytest.raises((WeightError, SelectionError), match=match):
        wrapped.finish_()
    assert not wrapped.done
    for name, kept in before.items():
        torch.testing.assert_close(wrapped.state_dict()[name], kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", ["input", "weight", "unit", "output"])
def test_example_inputs_with_any_group_of_gates(group: Any) -> None:
    """Only gates on outputs move to the norm; the finished network is the evaluated one, gates and all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = X.double()
    for _ in range(20):
        model(x)  # statistics of its own
    wrapped = Reparametrised(model, L0(1e-3, group=group), example_inputs=x)
    with torch.no_grad():
        for i, gates in enumerate(wrapped.latents.values()):
            gates.copy_(torch.linspace(-4, 4 - i, gates.numel()).view_as(gates))
    wrapped(x).square().mean().backward()
    evaluated = wrapped.eval()(x)
    scaled = model[0].weight.detach().clone()
    masks = wrapped.finish_().masks
    torch.testing.assert_close(model.eval()(x), evaluated, rtol=0, atol=0)
    assert ("1.weight" in masks) is (group == "output")
    # An inner gate scales what it lets through: by the closed form, half of it in the middle.
    if group == "input":
        gates = next(iter(wrapped.latents.values())).detach()
        wanted = scaled * (torch.sigmoid(gates) * 1.2 - 0.1).clamp(0, 1)
        torch.testing.assert_close(model[0].weight, wanted)


def test_a_seed_a_wrapped_and_a_compiled_model() -> None:
    with pytest.raises(RecipeError, match=r"seed .* must be a whole number of at least 0, got 'x'"):
        Reparametrised(network(), L0(), seed="x")  # type: ignore[arg-type]
    with pytest.raises(WeightError, match=r"made anew already .* call its finish_\(\) first"):
        Reparametrised(nn.Sequential(Reparametrised(network(), L0())), L0())
    model = network()
    wrapped = Reparametrised(torch.compile(model, backend="eager"), L0(group="weight"))
    wrapped(X).sum().backward()
    assert list(wrapped.finish_().masks) == ["0.weight", "2.weight"]
    assert wrapped.model is model


def test_scores_that_are_no_numbers_are_named() -> None:
    wrapped = Reparametrised(network(), Movement(0.5, cubic(begin=0, end=4)))
    with torch.no_grad():
        wrapped.latents["2/weight"].fill_(torch.nan)
    with pytest.raises(SelectionError, match=r"2.weight: 32 of 32 scores are NaN"):
        wrapped(X)
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(SelectionError, match=r"2.weight.*: 1 of 4 scores are NaN"):
        Penalised(model, Growing())


@pytest.mark.parametrize("value", ["3", 0, -1, 2.5, True])
def test_steps_per_epoch_that_are_no_count(value: Any) -> None:
    method = Method(target=Target("sparsity", 0.5), schedule=linear(begin=0, end=3, unit="epochs"))
    with pytest.raises(TargetError, match="steps_per_epoch must be a whole number of at least 1, got"):
        Pruner(network(), method, steps_per_epoch=value)
    with pytest.raises(TargetError, match="steps_per_epoch"):
        SparseTraining(network(), Target("sparsity", 0.5), RigL(end=4, every=1, unit="epochs"), steps_per_epoch=value)


@pytest.mark.parametrize("schedule", [None, 3, "cubic"])
def test_a_schedule_that_is_none(schedule: Any) -> None:
    with pytest.raises(TargetError, match="expected a schedule such as cubic"):
        Movement(0.5, schedule)


@pytest.mark.parametrize("options", [{"include": 3}, {"exclude": None}, {"include": "fc"}])
def test_filters_that_are_no_lists(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="must be a list, got"):
        L1(**options)


def test_penalties_of_what_is_no_model() -> None:
    for make in (lambda: Penalised(3, L1()), lambda: PenalisedActivity(3, Chauvin())):  # type: ignore[arg-type]
        with pytest.raises(WeightError, match=r"expected a torch.nn.Module, got int"):
            make()


@pytest.mark.parametrize("case", CASES["dynamics"], ids=str)
def test_dynamics_on_diverged_weights_refuse_or_keep_their_masks(case: Case) -> None:
    """Whatever a move ranks by, NaN is refused, by the name of the weight, and masks and counters stay."""
    from secateur.patterns import Channel
    from secateur.scores import Random
    from secateur.training import DYNAMICS

    model = network()
    dynamics = DYNAMICS[case.name](**case.kwargs)
    pattern = {"pattern": Channel()} if case.name == "soft_filter" else {}
    method = Method(target=Target("sparsity", 0.5), score=Random(0), **pattern)
    trainer = SparseTraining(model, method, dynamics, steps_per_epoch=1)
    if dynamics.sparse_start:
        trainer.start()

    def gradients(factor: float) -> Tensor:
        model.zero_grad()
        loss: Tensor = model(X).square().mean() * factor
        loss.backward()
        return loss

    gradients(1.0)
    trainer.step()
    with torch.no_grad():
        model[2].weight[0, :] = torch.nan
    gradients(1.0)
    masks = {name: mask.clone() for name, mask in trainer.masks.items()}
    for _ in range(8):
        state = trainer.state_dict()
        try:
            trainer.step()
        except SecateurError as error:
            assert "NaN" in str(error)  # noqa: PT017  # some steps move nothing
            after = trainer.state_dict()
            assert (after["steps"], after["level"]) == (state["steps"], state["level"])
            break
    assert all(torch.equal(mask, masks[name]) for name, mask in trainer.masks.items() if name in masks)
