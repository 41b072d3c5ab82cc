"""The laws of penalties."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.testing._common import require
from secateur.types import ActivityPenalty, LossPenalty, Penalty


class _Net(nn.Module):
    """A convolution, a linear layer and their norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.fc, self.bn2 = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2)


def check_penalty(penalty: Penalty) -> None:
    """Check the laws of penalties on a small network.

    The gradient is that of the value, at the start and after some steps; the proximal step solves its problem;
    functions are pure; the state keeps its names and shapes; a penalty that follows the loss refuses to go on without;
    and the penalty acts in at least one of the two ways.

    Args:
        penalty: The penalty.

    Raises:
        AssertionError: When a law is broken.
    """
    model = _Net().double()
    names = penalty.parameters(model)
    known = dict(model.named_parameters())
    require(bool(names) and set(names) <= known.keys(), penalty, f"presses on {names}, of {sorted(known)}")
    generator = torch.Generator().manual_seed(0)
    # Away from zero, where subgradients are no derivatives.
    weights: dict[str, Tensor] = {}
    for name in names:
        noise = torch.randn(known[name].shape, generator=generator, dtype=torch.float64)
        weights[name] = noise + 0.1 * noise.sign()
    state = penalty.start(weights)
    before = {n: w.clone() for n, w in weights.items()}, {n: t.clone() for n, t in state.items()}
    pressed = penalty.gradient(weights, state)
    rates = dict.fromkeys(names, torch.tensor(0.3, dtype=torch.float64))
    moved = penalty.proximal(weights, state, rates)
    require(bool(pressed or moved), penalty, "neither has a gradient nor a proximal step")
    _check_gradient(penalty, weights, state, pressed)
    _check_proximal(penalty, weights, state, moved, generator)
    nothing = {n: torch.zeros_like(w) for n, w in weights.items()}
    for tensors in (penalty.gradient(nothing, state), penalty.proximal(nothing, state, rates)):
        require(all(bool(torch.isfinite(t).all()) for t in tensors.values()), penalty, "not finite at zero")
    after = _later(penalty, weights, state)
    shapes = [{n: (tuple(t.shape), t.dtype) for n, t in s.items()} for s in (state, after)]
    require(shapes[0] == shapes[1], penalty, f"the state changes from {shapes[0]} to {shapes[1]}")
    _check_gradient(penalty, weights, after, penalty.gradient(weights, after))
    kept = all(torch.equal(w, before[0][n]) for n, w in weights.items())
    kept &= all(torch.equal(t, before[1][n]) for n, t in state.items())
    require(kept, penalty, "changes its arguments")


def _later(penalty: Penalty, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state after some steps, in which the loss falls if the penalty looks at it."""
    follows = isinstance(penalty, LossPenalty) and penalty.follows_loss
    if follows:
        refused = False
        try:
            penalty.advance(weights, state, 0, None)
        except SecateurError:
            refused = True
        require(refused, penalty, "follows the loss, and goes on without one")
    for step in range(25):
        state = penalty.advance(weights, state, step, 1.0 / (1 + step) if follows else None)
    return state


def _check_gradient(
    penalty: Penalty, weights: dict[str, Tensor], state: dict[str, Tensor], pressed: dict[str, Tensor]
) -> None:
    if not pressed:
        return
    require(pressed.keys() == weights.keys(), penalty, f"has a gradient for {sorted(pressed)} only")
    free = {n: w.clone().requires_grad_() for n, w in weights.items()}
    wanted = torch.autograd.grad(penalty.value(free, state), list(free.values()))
    for (name, got), want in zip(pressed.items(), wanted, strict=True):
        same = got.shape == want.shape and torch.allclose(got, want, rtol=1e-6, atol=1e-12)
        require(bool(same), penalty, f"{name}: the gradient is not that of the value")


def _check_proximal(
    penalty: Penalty,
    weights: dict[str, Tensor],
    state: dict[str, Tensor],
    moved: dict[str, Tensor],
    generator: torch.Generator,
) -> None:
    """No point near or far has a smaller distance plus penalty than the one that the proximal step returns."""
    if not moved:
        return

    def objective(at: dict[str, Tensor], rate: float) -> float:
        apart = sum(float((at[n] - weights[n]).square().sum()) for n in weights)
        return apart / (2 * rate) + float(penalty.value(at, state))

    for rate in (1e-3, 0.3, 100.0):
        best = penalty.proximal(weights, state, dict.fromkeys(weights, torch.tensor(rate, dtype=torch.float64)))
        require(best.keys() == weights.keys(), penalty, f"has a proximal step for {sorted(best)} only")
        least = objective(best, rate)
        for size in (1e-4, 1e-2, 1.0):
            for _ in range(20):
                noise = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()}
                other = objective({n: best[n] + size * noise[n] for n in weights}, rate)
                require(least <= other * (1 + 1e-12), penalty, f"rate {rate}: the proximal step is not the least")


def check_activity_penalty(penalty: ActivityPenalty) -> None:
    """Check the laws of penalties on activations.

    Silence costs nothing and activity something, of either sign alike; the gradient points at silence; a batch given
    twice costs what it costs once; half precision and an empty batch are finite; and nothing is changed.

    Args:
        penalty: The penalty, with a strength above zero.

    Raises:
        AssertionError: When a law is broken.
    """
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 4), (3, 4, 2, 2)):
        outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        before, free = outputs.clone(), outputs.clone().requires_grad_()
        value = penalty.value(free)
        require(value.dim() == 0 and float(value.detach()) > 0, penalty, f"costs {value} where units are active")
        require(float(penalty.value(torch.zeros_like(outputs))) == 0, penalty, "silence costs something")
        require(torch.allclose(penalty.value(-outputs), value.detach()), penalty, "minds the sign of activity")
        (slope,) = torch.autograd.grad(value, free)
        require(bool((slope * outputs > 0).all()), penalty, "does not press towards silence everywhere")
        twice = penalty.value(torch.cat([outputs, outputs]))
        require(torch.allclose(twice, value.detach()), penalty, "depends on the size of the batch")
        require(torch.equal(outputs, before), penalty, "changes its arguments")
    require(bool(torch.isfinite(penalty.value(torch.zeros(0, 4)))), penalty, "not finite on an empty batch")
