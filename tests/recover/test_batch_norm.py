"""Batch-norm repair: exact where theory says so, and restrained where it cannot be."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from secateur import Method, Target, prune_
from secateur.errors import DataError, SecateurWarning, WeightError
from secateur.recover import reestimate_bn_, rematch_bn_


def trained(affine: bool = True) -> nn.Module:
    """A network whose running statistics, scales (both signs) and shifts are all its own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, affine=affine),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 6),
        nn.BatchNorm1d(6),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(30):
        model(torch.randn(16, 3, 8, 8) * 2 + 1)
    return model.eval()


def images(n: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def outputs_of_norms(model: nn.Module, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: object, out: Tensor) -> None:
        axes = [d for d in range(out.dim()) if d != 1]
        seen.append((out.double().mean(axes), out.double().std(axes, correction=0)))

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "with a dead channel"])
def test_rematching_leaves_a_dense_model_bit_for_bit_alone(dead: bool) -> None:
    dense = trained()
    if dead:
        with torch.no_grad():
            dense[0].weight[3] = 0
            dense[0].bias[3] = 0
    model = copy.deepcopy(dense)
    # Inputs from quite another distribution than the one that the statistics come from.
    moved = rematch_bn_(model, dense, images() * 5 - 3)
    assert moved.layers == 3
    assert moved.moved == 0.0
    for name, value in dense.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_rematching_restores_mean_and_deviation_of_every_norm() -> None:
    dense = trained()
    model = copy.deepcopy(dense)
    prune_(model, Method(target=Target("sparsity", 0.6)))
    inputs = images(256)
    assert rematch_bn_(model, dense, inputs).moved > 0.01
    for (mean, std), (mean_d, std_d) in zip(
        outputs_of_norms(model, inputs), outputs_of_norms(dense, inputs), strict=True
    ):
        assert torch.allclose(mean, mean_d, atol=1e-5)
        assert torch.allclose(std, std_d, atol=1e-5)


def test_rematching_repairs_the_outputs() -> None:
    dense = trained()
    model = copy.deepcopy(dense)
    prune_(model, Method(target=Target("sparsity", 0.3)))
    fresh = images(128, seed=5)
    with torch.no_grad():
        before = (model(fresh) - dense(fresh)).square().mean()
        rematch_bn_(model, dense, images(256))
        after = (model(fresh) - dense(fresh)).square().mean()
    assert after < before


def test_a_channel_that_died_becomes_its_dense_mean() -> None:
    dense = trained()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[0].weight[2] = 0
    inputs = images()
    rematch_bn_(model, dense, inputs)
    assert float(model[1].weight[2].detach()) == 0.0
    assert torch.isfinite(model[1].weight).all()
    mean, std = outputs_of_norms(model, inputs)[0]
    assert torch.allclose(mean[2], outputs_of_norms(dense, inputs)[0][0][2], atol=1e-5)
    assert float(std[2]) == 0.0


def test_norms_that_cannot_be_set_are_named() -> None:
    dense = trained(affine=False)
    moved = rematch_bn_(copy.deepcopy(dense), dense, images())
    assert moved.layers == 2
    assert moved.skipped == {"1": "has no scale and shift to set"}


def test_rematching_puts_modes_back_and_refuses_another_network() -> None:
    dense = trained()
    model = copy.deepcopy(dense)
    model.train()
    model[1].eval()
    rematch_bn_(model, dense, images())
    assert [m.training for m in (model, model[0], model[1])] == [True, True, False]
    with pytest.raises(WeightError, match="other names or widths"):
        rematch_bn_(model, nn.Sequential(nn.BatchNorm2d(3)), images())
    with pytest.raises(DataError, match="larger batch"):
        rematch_bn_(model, dense, images(1))


def test_reestimation_is_the_average_over_batches() -> None:
    model = trained()
    batches = [images(16, seed) for seed in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        reestimate_bn_(model, batches)
    with torch.no_grad():
        seen = [model[0](b) for b in batches]
    mean = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    var = torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(model[1].running_var, var, rtol=1e-4)
    assert model[1].momentum == 0.1
    assert not any(m.training for m in model.modules())


def test_reestimation_warns_when_the_statistics_move_far_and_only_then() -> None:
    model = trained()
    same = [torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(s)) * 2 + 1 for s in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reestimate_bn_(copy.deepcopy(model), same).moved < 0.25
    with pytest.warns(SecateurWarning, match="rematch"):
        assert reestimate_bn_(model, [s + 2 for s in same]).moved > 0.25


def test_reestimation_without_batches_changes_nothing() -> None:
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match="at least one batch"):
        reestimate_bn_(model, [])
    for name in ("1.running_mean", "1.running_var", "4.running_var"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_a_repair_that_ends_half_way_changes_nothing() -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())

    def second_fails(which: nn.Module, batch: Tensor) -> Tensor:
        if float(batch[0, 0, 0, 0]) == 7.0:
            raise RuntimeError("no such batch")
        return which(batch)

    bad = images(8)
    bad[0, 0, 0, 0] = 7.0
    with pytest.raises(DataError, match=r"fails on batch 1 .*RuntimeError: no such batch"):
        reestimate_bn_(model, [images(8), bad], forward=second_fails)
    with pytest.raises(DataError, match="at least one batch"):
        reestimate_bn_(model, [])
    dense, pruned = copy.deepcopy(model), model

    def too_small_in_the_end(which: nn.Module, batch: Tensor) -> Tensor:
        features = which[:-2](batch)
        return which[-1](which[-2](features[:1] if which is pruned else features))

    with pytest.raises(DataError, match="one value per channel"):
        rematch_bn_(pruned, dense, images(8) + 1, forward=too_small_in_the_end)
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert pruned[1].momentum == 0.1


BAD: dict[str, tuple[object, str]] = {
    "NaN": ([images(8), images(8) * torch.nan], "NaN or infinite values reach it"),
    "infinite": ([images(8) * torch.inf], "NaN or infinite values reach it"),
    "an empty one": ([images(8), images(0)], "batch 1 has no samples"),
    "one tensor": (images(8), "got Tensor"),
    "a number": (3, "got int"),
    "another shape": ([images(8), images(8)[:, :2]], r"fails on batch 1 \(a Tensor: \(8, 2, 8, 8\) of float32"),
    "labels beside": ([(images(8), torch.zeros(8))], "fails on batch 0 .*TypeError"),
}


@pytest.mark.parametrize("what", BAD)
def test_batches_that_would_spoil_the_statistics_change_nothing(what: str) -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=f"(?s){BAD[what][1]}"):
        reestimate_bn_(model, BAD[what][0])  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (images(8) * torch.nan, "1: NaN or infinite values reach it"),
        (images(8)[:, :2], r"the dense model's forward fails .*\(8, 2, 8, 8\)"),
        (images(0), "one value per channel"),
    ],
    ids=["NaN", "another shape", "empty"],
)
def test_inputs_that_would_spoil_a_rematch_change_nothing(inputs: Tensor, words: str) -> None:
    dense = trained()
    model = copy.deepcopy(dense)
    prune_(model, Target("sparsity", 0.5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=f"(?s){words}"):
        rematch_bn_(model, dense, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(WeightError, match=r"expected a torch.nn.Module, got int"):
        rematch_bn_(model, 3, images(8))  # type: ignore[arg-type]
