"""The wrapper: any optimizer, resuming bit for bit, copies, the finished network, and refusals."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur
from secateur.checkpoint import load_model, save_model
from secateur.errors import CheckpointError, PatternError, RecipeError, SecateurWarning, TargetError, WeightError
from secateur.masks import MaskHook
from secateur.schedules import cubic, one_shot
from secateur.training import (
    L0,
    PARAMETRISATIONS,
    Movement,
    Reparametrised,
    SoftMovement,
    SoftThreshold,
    SrSte,
    VariationalDropout,
)
from secateur.types import Parametrisation

PARTS: dict[str, Parametrisation] = {
    "l0": L0(1e-3),
    "l0 of weights": L0(1e-3, group="weight"),
    "variational_dropout": VariationalDropout(1e-3, warm_up=5),
    "noise on weights": VariationalDropout(1e-3, local=False),
    "soft_threshold": SoftThreshold(-3.0, 1e-3),
    "movement": Movement(0.5, cubic(begin=2, end=8)),
    "soft_movement": SoftMovement(1e-2),
    "sr_ste": SrSte(2, 4),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: Adam(p, lr=1e-2),
    "adamw": lambda p: AdamW(p, lr=1e-2),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.Dropout(0.1),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def train(model: Reparametrised, optimizer: Optimizer, steps: range) -> list[float]:
    model.train()
    losses = []
    for step in steps:
        torch.manual_seed(step)  # of dropout and the data
        x, y = torch.randn(16, 4, 4, 4), torch.randint(4, (16,))
        loss = nn.functional.cross_entropy(model(x), y) + model.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("part", PARTS)
def test_any_optimizer_trains_both_and_resumes_bit_for_bit(part: str, optimizer: str, tmp_path: Any) -> None:
    one = Reparametrised(network(), PARTS[part], seed=7)
    before = copy.deepcopy(one.state_dict())
    first = OPTIMIZERS[optimizer](one.parameters())
    train(one, first, range(6))
    moved = [n for n, p in one.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [n for n, _ in one.named_parameters()]
    torch.save((one.state_dict(), first.state_dict()), tmp_path / "half.pt")
    straight = train(one, first, range(6, 12))

    state, of_optimizer = torch.load(tmp_path / "half.pt", weights_only=True)
    two = Reparametrised(network(), PARTS[part], seed=1)
    two.load_state_dict(state)
    second = OPTIMIZERS[optimizer](two.parameters())
    second.load_state_dict(of_optimizer)
    assert train(two, second, range(6, 12)) == straight
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())


@pytest.mark.parametrize("part", PARTS)
def test_evaluation_is_the_finished_network(part: str) -> None:
    wrapped = Reparametrised(network(), PARTS[part])
    train(wrapped, Adam(wrapped.parameters(), lr=1e-2), range(10))
    x = torch.randn(3, 4, 4, 4)
    wrapped.eval()
    answers, masks, said = wrapped(x), wrapped.masks(), wrapped.report()
    assert torch.equal(answers, wrapped(x))
    finished = wrapped.finish_()
    plain = network().eval()
    plain.load_state_dict(wrapped.model.state_dict())
    assert torch.equal(answers, plain(x))
    assert torch.equal(answers, wrapped(x))
    assert finished.report == said
    assert finished.masks.keys() == masks.keys()
    weights = dict(wrapped.model.named_parameters())
    for name, mask in finished.masks.items():
        assert torch.equal(mask, masks[name])
        assert not weights[name][~mask].any()
    rows = finished.report.layers
    zeros = sum(int((~finished.masks[r.name]).sum()) for r in rows)
    assert finished.report.achieved == pytest.approx(zeros / sum(r.total for r in rows))
    assert finished.report.to_dict()["layers"][0]["kept"] == rows[0].kept
    with pytest.raises(RecipeError, match="finish_"):
        wrapped.finish_()
    with pytest.raises(RecipeError, match="finish_"):
        wrapped.step()


@pytest.mark.parametrize("part", ["movement", "sr_ste"])
def test_what_was_asked_is_what_is_achieved(part: str) -> None:
    wrapped = Reparametrised(network(), PARTS[part])
    train(wrapped, SGD(wrapped.parameters(), lr=0.01), range(4))
    early = wrapped.report()
    train(wrapped, SGD(wrapped.parameters(), lr=0.01), range(4, 9))
    report = wrapped.finish_().report
    assert report.asked == report.goal == report.achieved == 0.5
    assert report.finished
    assert all(row.sparsity == 0.5 for row in report.layers)
    if part == "movement":
        assert early.asked is not None
        assert 0.0 < early.asked < 0.5
        assert not early.finished
        assert early.achieved == pytest.approx(early.asked, abs=0.01)
    found = Reparametrised(network(), L0()).report()
    assert (found.asked, found.goal, found.finished) == (None, None, True)


def test_zeros_stay_zero_when_training_goes_on_without_the_wrapper() -> None:
    wrapped = Reparametrised(network(), SrSte(1, 4))
    model, masks = wrapped.model, wrapped.finish_().masks
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    MaskHook(model, masks).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4, 4, 4)).square().mean().backward()
        optimizer.step()
    weights = dict(model.named_parameters())
    assert all(not weights[n][~m].any() for n, m in masks.items())
    assert all(weights[n][m].any() for n, m in masks.items())


def test_noise_is_a_function_of_seed_and_pass() -> None:
    x = torch.randn(2, 4, 4, 4)
    answers = []
    for seed in (0, 0, 1):
        wrapped = Reparametrised(network(), L0(), seed=seed)
        wrapped.model.eval()  # no dropout, and the training form of the weights
        answers.append((wrapped(x), wrapped(x)))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    assert not torch.equal(answers[0][0], answers[0][1])
    assert not torch.equal(answers[0][0], answers[2][0])


@pytest.mark.parametrize("part", PARTS)
def test_the_global_random_state_is_left_alone(part: str) -> None:
    wrapped = Reparametrised(nn.Linear(8, 4), PARTS[part])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    wrapped(torch.ones(2, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_copies_averages_and_files(tmp_path: Any) -> None:
    wrapped = Reparametrised(network(), L0())
    averaged = AveragedModel(wrapped, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(wrapped)
    train(wrapped, Adam(wrapped.parameters(), lr=0.1), range(2))
    averaged.update_parameters(wrapped)
    inner = averaged.module
    assert not torch.equal(inner.latents["4/weight"], wrapped.latents["4/weight"])
    finished = inner.finish_()
    assert not wrapped.done
    assert finished.report.layers
    save_model(tmp_path / "wrapped.safetensors", wrapped)
    other = Reparametrised(network(), L0(), seed=9)
    load_model(other, tmp_path / "wrapped.safetensors")
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in wrapped.state_dict().items())
    assert other.steps == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_half_precision_weights_have_wide_latents(part: str, dtype: torch.dtype) -> None:
    wrapped = Reparametrised(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), PARTS[part])
    optimizer = SGD(wrapped.parameters(), lr=0.01)
    for _ in range(3):
        (wrapped(torch.randn(4, 8, dtype=dtype)).float().square().mean() + wrapped.penalty()).backward()
        optimizer.step()
        wrapped.step()
    assert all(p.dtype == torch.float32 for p in wrapped.latents.values())
    assert all(bool(torch.isfinite(p).all()) for p in wrapped.parameters())
    wrapped.finish_()


def test_recurrent_and_attention_weights_are_made_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.attention = nn.LSTM(4, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.rnn(x)[0]
            out: Tensor = self.attention(y, y, y)[0]
            return out

    wrapped = Reparametrised(Net(), SrSte(2, 4))
    names = [row.name for row in wrapped.report().layers]
    assert names == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "attention.in_proj_weight", "attention.out_proj.weight"]
    x = torch.randn(2, 5, 4)
    made = wrapped(x)
    assert not torch.allclose(made, wrapped.model(x))
    wrapped.eval()
    answers = wrapped(x)
    wrapped.finish_()
    torch.testing.assert_close(wrapped.model.eval()(x), answers)
    with pytest.raises(PatternError, match="draw it on the weights"):
        Reparametrised(Net(), VariationalDropout())
    Reparametrised(Net(), VariationalDropout(local=False))(x)


def test_frozen_weights_keep_their_values_and_learn_what_goes() -> None:
    model = nn.Linear(8, 4).requires_grad_(False)
    before = model.weight.clone()
    wrapped = Reparametrised(model, Movement(0.5, one_shot(at=2, unit="steps")))
    optimizer = SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        wrapped(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        wrapped.step()
    masks = wrapped.finish_().masks
    assert torch.equal(model.weight[masks["weight"]], before[masks["weight"]])
    assert int(masks["weight"].sum()) == 16


def test_shrink_takes_the_masks_of_every_part_that_empties_units() -> None:
    wrapped = Reparametrised(network(), L0(), exclude=["0"])
    wrapped.latents["7/weight"].data[::2] = -4.0
    finished = wrapped.eval().finish_()
    x = torch.randn(2, 4, 4, 4)
    answers = wrapped.model(x)
    assert secateur.shrink_(wrapped.model, finished.masks, x).proof.equal
    assert wrapped.model[4].out_features == 8
    torch.testing.assert_close(wrapped.model(x), answers)


# Refusals


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


def test_refuses_what_cannot_be_made() -> None:
    with pytest.raises(RecipeError, match="expected a Parametrisation"):
        Reparametrised(network(), "l0")  # type: ignore[arg-type]
    with pytest.raises(WeightError, match="did you mean '4'"):
        Reparametrised(network(), L0(), include=["44"])
    with pytest.raises(WeightError, match=r"two.weight|one.weight"):
        Reparametrised(Tied(), L0())
    with pytest.raises(WeightError, match="nothing to prune"):
        Reparametrised(nn.ReLU(), L0())
    with pytest.raises(WeightError, match="meta"):
        Reparametrised(nn.Linear(4, 4, device="meta"), L0())
    integers = nn.Linear(4, 4)
    integers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WeightError, match=r"dtype torch.int8.*quantising"):
        Reparametrised(integers, L0())
    with pytest.raises(PatternError, match=r"2:4.*got 3.*The same holds for 1.weight"):
        Reparametrised(nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)), SrSte())
    with pytest.raises(TargetError, match=r"leaves none of its 4 weights; at most 0.75"):
        Reparametrised(nn.Linear(4, 1), Movement(0.9))
    with pytest.raises(TargetError, match=r"of at least 0 and below 1, got 1.0"):
        Movement(1.0)
    with pytest.raises(TargetError, match="counts rounds"):
        Movement(0.5, one_shot())
    with pytest.raises(RecipeError, match=r"scores start at 0.* must be a number below 0"):
        SoftMovement(threshold=0.1)
    with pytest.raises(RecipeError, match=r"threshold = .* must lie within"):
        VariationalDropout(threshold=9.0)
    with pytest.raises(RecipeError, match="soft_threshold: decay"):
        SoftThreshold(decay=float("nan"))
    with pytest.raises(PatternError, match="is not a pattern"):
        SrSte(5, 4)


def test_names_that_cannot_be_told_apart_are_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(4, 4)

    model = nn.Module()
    model.add_module("a/b", nn.Linear(4, 4))
    model.add_module("a", Inner())
    with pytest.raises(WeightError, match="rename a module"):
        Reparametrised(model, L0())
    assert list(Reparametrised(model, L0(), exclude=["a.b"]).latents) == ["a/b/weight"]


@pytest.mark.parametrize("part", PARTS)
def test_autocast(part: str) -> None:
    wrapped = Reparametrised(network(), PARTS[part])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = wrapped(torch.randn(4, 4, 4, 4))
        assert out.dtype == torch.bfloat16
        (out.float().square().mean() + wrapped.penalty()).backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if not n.startswith("model.1.")]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


def test_refuses_latents_in_half_precision() -> None:
    wrapped = Reparametrised(nn.Linear(8, 4), L0()).half()
    with pytest.raises(WeightError, match=r"the latent of weight has dtype torch\.float16"):
        wrapped(torch.ones(1, 8).half())


def test_refuses_the_state_of_another() -> None:
    state = Reparametrised(network(), L0(1e-3)).state_dict()
    other = Reparametrised(network(), L0(1e-2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"another parametrisation.*L0\(strength=0.01"):
        other.load_state_dict(state)
    state["progress"] = torch.ones(3)
    with pytest.raises(CheckpointError, match="version"):
        other.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_diverged_training_is_not_written() -> None:
    wrapped = Reparametrised(nn.Linear(8, 4), L0())
    with torch.no_grad():
        wrapped.model.weight[0, 0] = torch.nan
    before = wrapped.model.weight.detach().clone()
    with pytest.raises(WeightError, match="weight is not finite"):
        wrapped.finish_()
    assert torch.equal(wrapped.model.weight.nan_to_num(9.0), before.nan_to_num(9.0))
    assert not wrapped.done


def test_an_emptied_layer_is_said() -> None:
    wrapped = Reparametrised(nn.Linear(8, 4), SoftThreshold(50.0))
    with pytest.warns(SecateurWarning, match="nothing is left of weight"):
        report = wrapped.finish_().report
    assert report.achieved == 1.0


def test_every_registered_part_is_tried_here() -> None:
    assert {type(p) for p in PARTS.values()} == set(PARAMETRISATIONS.values())
