"""Movement, thresholds and N:M from scratch, against formulas by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from secateur.schedules import cubic, linear, one_shot
from secateur.training import Movement, Reparametrised, SoftMovement, SoftThreshold, SrSte
from secateur.training._tensors import zeroed
from secateur.types import Moment, Weight


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(16, 4, generator=generator, dtype=torch.float64)


# Movement


def test_scores_add_up_minus_gradient_times_weight() -> None:
    """S_T = -lr sum_t g_t w with the weights held still; g is the gradient of the masked weight, by hand."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False).double()
    w = layer.weight.detach().clone()
    wrapped = Reparametrised(layer, Movement(0.5, one_shot(at=5, unit="steps")))
    optimizer = SGD(wrapped.latents.parameters(), lr=0.3)
    scores = torch.zeros(4, 6, dtype=torch.float64)
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        ((wrapped(x) - y).square().sum() / 32).backward()
        optimizer.step()
        wrapped.step()
        kept = torch.ones(24, dtype=torch.bool)
        if step >= 5:
            kept[scores.flatten().argsort()[:12]] = False
        masked = w * kept.view(4, 6)
        g = (x @ masked.T - y).T @ x / 16
        scores -= 0.3 * g * w
    torch.testing.assert_close(wrapped.latents["weight"].detach(), scores, rtol=1e-12, atol=1e-14)
    assert torch.equal(layer.weight, w)


def test_gradients_of_masked_weights_and_of_all_scores() -> None:
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    wrapped = Reparametrised(layer, Movement(0.5, one_shot(unit="steps")))
    wrapped.latents["weight"].data.copy_(torch.tensor([[0.3, -0.1, 0.2, 0.0]]))
    out = wrapped(torch.tensor([[5.0, 6.0, 7.0, 8.0]], dtype=torch.float64))
    assert float(out.detach()) == 5.0 + 21.0
    out.sum().backward()
    assert layer.weight.grad.tolist() == [[5.0, 0.0, 7.0, 0.0]]
    assert wrapped.latents["weight"].grad.tolist() == [[5.0, 12.0, 21.0, 32.0]]


def test_the_number_kept_is_exact_at_every_step_and_masks_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    schedule = cubic(begin=3, end=15, every=3)
    wrapped = Reparametrised(model, Movement(0.83, schedule))
    optimizer = SGD([{"params": model.parameters(), "lr": 0.1}, {"params": wrapped.latents.parameters(), "lr": 5.0}])
    previous, returned = None, 0
    for step in range(25):
        level = max([0.0, *(schedule.level(i, 0.83) for i in range(5) if schedule.time(i) <= step)])
        masks = wrapped.masks()
        for name, size in (("0.weight", 42), ("2.weight", 28)):
            assert int(masks[name].sum()) == size - round(level * size)
        returned += 0 if previous is None else int((masks["0.weight"] & ~previous).sum())
        previous = masks["0.weight"]
        x, y = batch(step)
        optimizer.zero_grad()
        (wrapped(x) - y).square().mean().backward()
        optimizer.step()
        wrapped.step()
    assert returned > 0
    assert wrapped.report().finished


def test_weights_that_shrink_go_whatever_their_size() -> None:
    """Fine-tuning pulls the large first weights to zero, and the small last ones away from it."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[2.0, -2.0, 0.1, -0.1]]))
    wrapped = Reparametrised(layer, Movement(0.5, linear(begin=10, end=20)))
    optimizer = SGD(wrapped.parameters(), lr=0.01)
    for step in range(30):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (wrapped(x) - x @ torch.tensor([[0.0], [0.0], [1.0], [-1.0]])).square().mean().backward()
        optimizer.step()
        wrapped.step()
    assert wrapped.finish_().masks["weight"].tolist() == [[False, False, True, True]]


def test_soft_movement_keeps_what_is_above_and_presses_down() -> None:
    w = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    scores = torch.tensor([[-0.5, -0.6, 0.4]], dtype=torch.float64, requires_grad=True)
    at = Moment({"w": w}, {"w": scores}, {"w": Weight("w", (1, 3))})
    part = SoftMovement(0.2, threshold=-0.5)
    assert part.final(at)[1]["w"].tolist() == [[False, False, True]]  # above, not at
    penalty = part.penalty(at)
    sigmoids = [1 / (1 + math.exp(-s)) for s in (-0.5, -0.6, 0.4)]
    assert float(penalty.detach()) == pytest.approx(0.2 * sum(sigmoids), rel=1e-12)
    (part.weights(at, None)["w"] * torch.tensor([[10.0, 20.0, 30.0]])).sum().backward()
    penalty.backward()
    assert scores.grad is not None
    want = [g * v + 0.2 * p * (1 - p) for g, v, p in zip((10, 20, 30), (1, 2, 3), sigmoids, strict=True)]
    assert scores.grad[0].tolist() == pytest.approx(want, rel=1e-12)


def test_soft_movement_alone_presses_everything_out() -> None:
    wrapped = Reparametrised(nn.Linear(4, 2), SoftMovement(1.0))
    optimizer = SGD(wrapped.parameters(), lr=0.5)
    kept = []
    for _ in range(30):
        optimizer.zero_grad()
        wrapped.penalty().backward()
        optimizer.step()
        wrapped.step()
        kept.append(int(wrapped.masks()["weight"].sum()))
    assert (kept[0], kept[-1]) == (8, 0)


# Soft thresholds


def test_threshold_gradients_by_hand() -> None:
    w = torch.tensor([2.0, -1.5, 0.4, -0.1], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    at = Moment({"w": w}, {"w": s}, {"w": Weight("w", (4,))})
    part = SoftThreshold(decay=0.7)
    threshold = 1 / (1 + math.exp(-0.3))
    made = part.weights(at, None)["w"]
    assert made.tolist() == pytest.approx([2.0 - threshold, -(1.5 - threshold), 0.0, 0.0], rel=1e-12)
    ((made * g).sum() + part.penalty(at)).backward()
    assert w.grad is not None
    assert s.grad is not None
    assert w.grad.tolist() == [1.0, 2.0, 0.0, 0.0]
    # dW/ds = -sign(w) sigmoid'(s) where |w| is above; the decay adds lambda s.
    assert float(s.grad) == pytest.approx(-(1.0 - 2.0) * threshold * (1 - threshold) + 0.7 * 0.3, rel=1e-12)


def test_decay_is_the_weight_decay_of_plain_sgd() -> None:
    one = Reparametrised(nn.Linear(4, 2), SoftThreshold(-3200.0, 0.1))
    two = Reparametrised(nn.Linear(4, 2), SoftThreshold(-3200.0, 0.0))
    optimizers = [
        SGD(one.latents.parameters(), lr=0.5),
        SGD(two.latents.parameters(), lr=0.5, weight_decay=0.1),
    ]
    for _ in range(5):
        for wrapped, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            (wrapped(torch.ones(1, 4)).sum() + wrapped.penalty()).backward()
            optimizer.step()
    assert float(one.latents["weight"].detach()) == pytest.approx(-3200 * 0.95**5, rel=1e-6)
    assert torch.equal(one.latents["weight"], two.latents["weight"])


def test_the_threshold_rises_where_weights_are_not_needed() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    nn.init.constant_(layer.weight, 0.3)  # weights under the first threshold would never come back
    wrapped = Reparametrised(layer, SoftThreshold(-4.0, 1e-2))
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.02)
    for step in range(400):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ((wrapped(x) - x[:, :2].sum(1, keepdim=True)).square().mean() + wrapped.penalty()).backward()
        optimizer.step()
        wrapped.step()
    finished = wrapped.finish_()
    assert finished.masks["weight"][0].tolist() == [True] * 2 + [False] * 6
    assert wrapped.model.weight[0, :2].tolist() == pytest.approx([1.0, 1.0], abs=0.1)


# N:M


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 3, 3)])
def test_refined_gradient_by_hand(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    at = Moment({"w": w}, {}, {"w": Weight("w", shape)})
    made = SrSte(1, 4, decay=0.3).weights(at, None)["w"]
    (made * g).sum().backward()
    values = w.detach()
    mask = torch.zeros(shape, dtype=torch.bool)
    for o in range(4):
        for group in range(2):
            columns = values[o, 4 * group : 4 * group + 4].abs()
            mask[o, 4 * group : 4 * group + 4].scatter_(0, columns.argmax(0, keepdim=True), True)
    assert torch.equal(made, values * mask)
    assert w.grad is not None
    torch.testing.assert_close(w.grad, g + 0.3 * (values * ~mask), rtol=1e-12, atol=1e-14)


def test_the_mask_follows_the_weights_and_decay_settles_it() -> None:
    """Pruned weights go on getting gradients, so they come back; with a decay fewer do."""
    flips = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        wrapped = Reparametrised(nn.Linear(16, 8), SrSte(2, 4, decay=decay))
        optimizer = SGD(wrapped.parameters(), lr=0.05)
        changed, previous = 0, wrapped.masks()["weight"]
        for step in range(100):
            generator = torch.Generator().manual_seed(step)
            x, noise = torch.randn(8, 16, generator=generator), torch.randn(8, 8, generator=generator)
            optimizer.zero_grad()
            (wrapped(x) - 3 * noise).square().sum(1).mean().backward()
            optimizer.step()
            wrapped.step()
            mask = wrapped.masks()["weight"]
            changed, previous = changed + int((mask != previous).sum()), mask
        flips.append(changed)
    assert 0 < flips[1] < flips[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeroing_by_bits_is_a_choice_by_truth_values(dtype: torch.dtype) -> None:
    """Kept values bit for bit, minus zero and NaN included; the others plus zero, whatever they were."""
    tensor = torch.randn(33, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = torch.rand(33, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype)
    for row in (0, 1):
        tensor[row, :4], keep[row] = odd, bool(row)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for values, kept in ((tensor, keep), (tensor.T, keep.T)):
        got = zeroed(values, kept).contiguous().view(bits)
        wanted = [
            [v if k else 0 for v, k in zip(*rows, strict=True)]
            for rows in zip(values.contiguous().view(bits).tolist(), kept.tolist(), strict=True)
        ]
        assert got.tolist() == wanted
