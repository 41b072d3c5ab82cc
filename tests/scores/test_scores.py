"""Scores against hand loops, and the gradient score against the loss itself."""

import math

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.scores import Magnitude, Random, WeightGradient
from secateur.stats import collect_gradients
from secateur.testing import loss_changes, mask_derivatives, mask_differences


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_batches(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, dtype=torch.float64, generator=generator), torch.randint(0, 3, (6,), generator=generator))
        for _ in range(n)
    ]


def gradient_score(model: nn.Module, sign: str, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    score = WeightGradient(sign)
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    stats = collect_gradients(model, weights, loss_fn, batches, needs=score.needs)
    return score({name: w.detach() for name, w in weights.items()}, stats)


# --- random ----------------------------------------------------------------------------------------------------------


def test_random_depends_on_seed_and_name_only() -> None:
    w = torch.zeros(50, 4)
    alone = Random(1)({"fc": w}, {})["fc"]
    beside = Random(1)({"other": w, "fc": w}, {})
    assert torch.equal(alone, beside["fc"])
    assert torch.equal(alone, Random(1)({"fc": w + 3}, {})["fc"])
    assert not torch.equal(alone, beside["other"])
    assert not torch.equal(alone, Random(2)({"fc": w}, {})["fc"])
    assert not torch.equal(alone, Random(-1)({"fc": w}, {})["fc"])


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Random(1)({"fc": torch.zeros(4, 4)}, {})
    assert torch.equal(torch.rand(3), expected)


def test_random_is_uniform() -> None:
    values = Random(0)({"fc": torch.zeros(200, 500)}, {})["fc"].flatten().double().sort().values
    ideal = torch.arange(1, values.numel() + 1, dtype=torch.float64) / values.numel()
    statistic = float((values - ideal).abs().max()) * math.sqrt(values.numel())  # Kolmogorov-Smirnov
    assert statistic < 1.95, "rejected at the level 0.001"


# --- magnitude -------------------------------------------------------------------------------------------------------


def test_magnitude_by_hand() -> None:
    w = torch.tensor([[-3.0, 0.0], [-0.0, 0.5]])
    assert Magnitude()({"w": w}, {})["w"].tolist() == [[3.0, 0.0], [0.0, 0.5]]
    assert Magnitude(p=2)({"w": w}, {})["w"].tolist() == [[9.0, 0.0], [0.0, 0.25]]


@pytest.mark.parametrize("p", [0, 3, 0.5, -1])
def test_other_powers_are_refused(p: float) -> None:
    with pytest.raises(SecateurError, match=str(p)):
        Magnitude(p=p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_small_halves_do_not_underflow(dtype: torch.dtype) -> None:
    w = torch.tensor([1e-5, 2e-5, 4e-5], dtype=dtype)
    assert (w.half() * w.half() == 0).all(), "they do in float16"
    scores = Magnitude(p=2)({"w": w}, {})["w"]
    assert scores[0] < scores[1] < scores[2]
    assert scores[0] > 0


# --- |w·g| -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["absolute", "signed", "descent"])
def test_weight_gradient_is_a_hand_loop(sign: str) -> None:
    model, batches = small_net(), make_batches(3)
    scores = gradient_score(model, sign, batches)
    for name, w in model.named_parameters():
        if w.dim() != 2:
            continue
        per_batch = []
        for batch in batches:
            model.zero_grad()
            loss_fn(model, batch).backward()
            per_batch.append(w.grad.clone())
        w = w.detach()
        want = torch.zeros_like(w)
        for i in range(w.shape[0]):
            for j in range(w.shape[1]):
                products = [float(w[i, j]) * float(g[i, j]) for g in per_batch]
                mean = sum(products) / len(products)
                want[i, j] = {
                    "absolute": sum(map(abs, products)) / len(products),
                    "signed": abs(mean),
                    "descent": -mean,
                }[sign]
        torch.testing.assert_close(scores[name], want, rtol=1e-10, atol=1e-14)


def test_opposite_batches_cancel_in_signed_only() -> None:
    model = nn.Linear(2, 1, bias=False).double()  # of the second input nothing cancels: there is something to rank
    batches = [torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[-1.0, 1.0]]).double()]
    score = {}
    for sign in ("absolute", "signed", "descent"):
        part = WeightGradient(sign)
        stats = collect_gradients(model, {"weight": model.weight}, lambda m, x: m(x).sum(), batches, needs=part.needs)
        score[sign] = float(part({"weight": model.weight.detach()}, stats)["weight"][0, 0])
    assert score["absolute"] == abs(model.weight[0, 0].item())
    assert score["signed"] == 0.0
    assert score["descent"] == 0.0


def test_signed_is_the_derivative_by_a_mask() -> None:
    """The SNIP identity: |w·g| = |dL/dc| for a multiplicative mask c at 1."""
    model, (batch,) = small_net(), make_batches(1)
    scores = gradient_score(model, "signed", [batch])
    names = list(scores)
    derivatives = mask_derivatives(model, names, loss_fn, batch)
    differences = mask_differences(model, names, loss_fn, batch)
    for name in names:
        torch.testing.assert_close(scores[name], derivatives[name].abs(), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(scores[name], differences[name].abs(), rtol=1e-5, atol=1e-9)


def test_descent_is_the_loss_change_on_a_linear_loss() -> None:
    """Exact where the first order is everything: removing w changes a linear loss by -w·g."""
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def linear_loss(m: nn.Module, batch: Tensor) -> Tensor:
        return (m(batch) * torch.tensor([1.0, -2.0]).double()).sum()

    part = WeightGradient("descent")
    stats = collect_gradients(model, {"weight": model.weight}, linear_loss, [x], needs=part.needs)
    score = part({"weight": model.weight.detach()}, stats)["weight"]
    torch.testing.assert_close(score, loss_changes(model, ["weight"], linear_loss, x)["weight"])


def test_descent_predicts_the_loss_change_of_small_weights() -> None:
    """The error of the first order is second order: a tenth of the weight, a hundredth of the error."""
    errors = []
    for scale in (1e-2, 1e-3):
        model, (batch,) = small_net(), make_batches(1)
        with torch.no_grad():
            model[2].weight.mul_(scale)
        predicted = gradient_score(model, "descent", [batch])["2.weight"]
        measured = loss_changes(model, ["2.weight"], loss_fn, batch)["2.weight"]
        errors.append(float((predicted - measured).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)


def test_weight_gradient_needs_what_it_reads() -> None:
    assert WeightGradient().needs == {"absolute_gradient"}
    assert WeightGradient("signed").needs == {"gradient"}
    assert WeightGradient("descent").needs == {"gradient"}


@pytest.mark.parametrize("sign", ["abs", "", "Signed"])
def test_an_unknown_sign_is_refused(sign: str) -> None:
    """A typo must not become another score under the same name."""
    with pytest.raises(SecateurError, match="sign"):
        WeightGradient(sign)


def test_half_precision_products_are_wide() -> None:
    w = torch.tensor([1e-4, 2e-4], dtype=torch.float16)
    g = {"gradient": {"w": torch.tensor([1e-6, 1e-6])}}
    score = WeightGradient("signed")({"w": w}, g)["w"]
    assert score.dtype == torch.float32
    assert 0 < score[0] < score[1]


def test_scaling_before_a_batch_norm_changes_magnitude_but_not_the_network() -> None:
    """Documents a limit of global magnitude: it compares layers by scale, which a norm makes meaningless."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, eps=1e-20), nn.ReLU(), nn.Conv2d(3, 2, 1))
    model = model.double().train()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    before = model(x)
    magnitude = Magnitude()({"w": model[0].weight.detach()}, {})["w"]
    with torch.no_grad():
        model[0].weight.mul_(1000.0)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(Magnitude()({"w": model[0].weight.detach()}, {})["w"], 1000 * magnitude)
