"""Collected gradients against manual loops, and everything that must be as it was afterwards."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError
from secateur.stats import STATISTICS, collect_gradients

BOTH = frozenset({"gradient", "absolute_gradient"})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2)
    )


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 1, 4, 4, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(n)]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def by_hand(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    """Gradients per batch by plain ``backward()`` in evaluation mode, on a copy."""
    model = copy.deepcopy(model).eval()
    out: dict[str, list[Tensor]] = {name: [] for name in weights_of(model)}
    for batch in data:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, p in weights_of(model).items():
            out[name].append(p.grad.double())
    return out


@pytest.mark.parametrize("needs", [{"gradient"}, {"absolute_gradient"}, BOTH], ids=lambda n: "+".join(sorted(n)))
def test_averages_are_manual_loops(needs: set[str]) -> None:
    model, data = network(), batches()
    got = collect_gradients(model, weights_of(model), loss_fn, data, needs=frozenset(needs))
    assert got.keys() == needs
    for name, gradients in by_hand(model, data).items():
        want = {
            "gradient": sum(gradients) / len(gradients),
            "absolute_gradient": sum(g.abs() for g in gradients) / len(gradients),
        }
        for need in needs:
            torch.testing.assert_close(got[need][name].double(), want[need], rtol=1e-5, atol=1e-8)


def test_the_model_is_as_it_was() -> None:
    model = network().train()
    model[1].eval()  # a frozen norm, as in fine-tuning
    loss_fn(model, batches(1)[0]).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    collect_gradients(model, weights_of(model), loss_fn, batches(), needs=BOTH)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), (
        "weights or buffers moved"
    )
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


def test_grad_stays_none_where_it_was_none() -> None:
    model = network()
    collect_gradients(model, weights_of(model), loss_fn, batches(), needs=BOTH)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off() -> None:
    model, data = network().train(), batches()
    one, two = (collect_gradients(model, weights_of(model), loss_fn, data, needs=BOTH) for _ in range(2))
    assert all(torch.equal(one[need][name], two[need][name]) for need in BOTH for name in one[need])


def test_frozen_weights_are_scored_and_stay_frozen() -> None:
    model = network()
    free = collect_gradients(model, weights_of(model), loss_fn, batches(), needs={"gradient"})["gradient"]
    model.requires_grad_(False)
    frozen = collect_gradients(model, weights_of(model), loss_fn, batches(), needs={"gradient"})["gradient"]
    assert all(torch.equal(free[name], frozen[name]) for name in free)
    assert not any(p.requires_grad for p in model.parameters())


def test_flags_come_back_after_an_error() -> None:
    model = network().train()
    model[0].weight.requires_grad_(False)

    def broken(model: nn.Module, batch: object) -> Tensor:
        raise RuntimeError("from the user's loss")

    with pytest.raises(MissingStatsError, match=r"fails on batch 0 .*RuntimeError: from the user's loss"):
        collect_gradients(model, weights_of(model), broken, batches(), needs=BOTH)
    assert model.training
    assert not model[0].weight.requires_grad


def test_no_grad_around_the_call_does_not_matter() -> None:
    model = network()
    with torch.no_grad():
        got = collect_gradients(model, weights_of(model), loss_fn, batches(), needs={"gradient"})
    assert all(float(g.abs().sum()) > 0 for g in got["gradient"].values())


def test_a_weight_that_the_loss_does_not_use_has_zero_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    weights = weights_of(model)
    got = collect_gradients(model, weights, lambda m, x: m["used"](x).sum(), [torch.ones(1, 2)], needs=BOTH)
    assert torch.equal(got["gradient"]["unused.weight"], torch.zeros(2, 2))
    assert torch.equal(got["absolute_gradient"]["used.weight"], torch.ones(2, 2))


def test_a_tied_weight_gets_the_gradient_of_all_its_uses() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    x = torch.randn(5, 3)
    model = nn.Sequential(first, second)
    got = collect_gradients(model, {"0.weight": first.weight}, lambda m, x: m(x).square().mean(), [x], needs=BOTH)
    w = first.weight.detach().clone().requires_grad_()
    (x @ w.T @ w.T).square().mean().backward()
    torch.testing.assert_close(got["gradient"]["0.weight"], w.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 1, bias=False).to(dtype)
    data = [torch.full((1, 2), value, dtype=dtype) for value in [1.0] + [2.0**-9] * 16]
    got = collect_gradients(model, weights_of(model), lambda m, x: m(x).sum(), data, needs={"gradient"})
    total = got["gradient"]["weight"]
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(total, torch.full((1, 2), (1 + 2**-5) / 17, dtype=total.dtype))


# --- refusals --------------------------------------------------------------------------------------------------------


def nothing() -> Iterator[Tensor]:
    yield from ()


def used_up() -> Iterator[int]:
    iterator = iter([1, 2])
    list(iterator)
    return iterator


@pytest.mark.parametrize("source", [list, nothing, used_up])
def test_no_batches(source: Callable[[], object]) -> None:
    model = network()
    with pytest.raises(MissingStatsError, match="no batches"):
        collect_gradients(model, weights_of(model), loss_fn, source(), needs=BOTH)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]), r"one number per batch.*\(4, 2\).*batch 0"),
        (lambda m, b: loss_fn(m, b).item(), "one number per batch.*float"),
        (lambda m, b: loss_fn(m, b) * torch.nan, "loss is nan on batch 0"),
        (lambda m, b: loss_fn(m, b) * torch.inf, "loss is inf"),
        (lambda m, b: loss_fn(m, b).detach(), "no gradient"),
        (lambda m, b: (m(b[0]) > 0).sum(), "no gradient"),
    ],
)
def test_losses_that_have_no_gradient(loss: Callable[..., Tensor], message: str) -> None:
    model = network().train()
    with pytest.raises(MissingStatsError, match=message):
        collect_gradients(model, weights_of(model), loss, batches(), needs=BOTH)
    assert model.training


def test_a_bad_batch_is_counted() -> None:
    data = batches()
    data[2][1].fill_(torch.nan)
    model = network()
    with pytest.raises(MissingStatsError, match="batch 2"):
        collect_gradients(model, weights_of(model), loss_fn, data, needs=BOTH)


def test_scores_ask_for_what_is_collected() -> None:
    from secateur.scores import Magnitude, Random, WeightGradient

    for score in (Magnitude(), Random(0), WeightGradient(), WeightGradient("signed"), WeightGradient("descent")):
        assert score.needs <= STATISTICS


def test_gradients_that_rank_nothing_are_refused() -> None:
    model = network()
    with pytest.raises(MissingStatsError, match=r"zero for every weight.*minimum"):
        collect_gradients(model, weights_of(model), lambda m, b: loss_fn(m, b) * 0, batches(), needs=BOTH)
    rooted = lambda m, b: (m(b[0]) * 0).square().sum().sqrt()  # noqa: E731
    with pytest.raises(MissingStatsError, match=r"gradient of 0.weight is NaN or infinite"):
        collect_gradients(model, weights_of(model), rooted, batches(), needs=BOTH)


def test_integers_have_no_gradient() -> None:
    codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model = network()
    with pytest.raises(MissingStatsError, match=r"codes has dtype torch.int8"):
        collect_gradients(model, {**weights_of(model), "codes": codes}, loss_fn, batches(), needs=BOTH)
