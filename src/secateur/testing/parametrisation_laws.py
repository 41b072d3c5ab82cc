"""The laws of parametrisations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.prunable import find_prunable
from secateur.testing._common import require
from secateur.training import Reparametrised
from secateur.types import Moment, Parametrisation, Tensors

_LATE = 10**7  # past the end of any schedule


class _Net(nn.Module):
    """A convolution and two linear layers, with sizes that N:M up to M = 4 divides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.fc(torch.tanh(self.conv(x)).mean((2, 3)))))
        return y


def _net(dtype: torch.dtype = torch.float64) -> _Net:
    model, generator = _Net(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (0.4 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return model.to(dtype)


def check_parametrisation(parametrisation: Parametrisation) -> None:
    """Check the laws of parametrisations on a small network.

    Functions are pure and the same every time without noise; what is made has the shapes and types of what it is made
    of; pruned weights are exactly zero, and there are some; gradients reach every weight and latent; the penalty is one
    finite number with finite gradients; what was asked for is what is achieved, to a rounding per weight; in evaluation
    mode the network is the finished one; and a saved state goes on bit for bit, under a noise of its own.

    Args:
        parametrisation: The parametrisation.

    Raises:
        AssertionError: When a law is broken.
    """
    for dtype in (torch.float64, torch.bfloat16):
        at = _moment(parametrisation, dtype, spread=8.0)
        for step in (0, 5, _LATE):
            _check_functions(parametrisation, replace(at, step=step))
        if parametrisation.asked(None) is None:
            kept = parametrisation.final(at)[1].values()
            some = 0 < sum(int(mask.sum()) for mask in kept) < sum(mask.numel() for mask in kept)
            require(some, parametrisation, "keeps all or nothing, however far the latents are spread")
    at = _moment(parametrisation, torch.float64, spread=1.0)
    for step in (0, _LATE):
        _check_asked(parametrisation, replace(at, step=step))
    _check_gradients(parametrisation, replace(at, step=5))
    _check_network(parametrisation)


def _moment(part: Parametrisation, dtype: torch.dtype, spread: float) -> Moment:
    model = _net(dtype)
    layouts = find_prunable(model).weights
    for layout in layouts.values():
        part.check(layout)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    started = [part.start(weights, layouts, torch.Generator().manual_seed(1)) for _ in range(2)]
    _same(part, "the latents of one seed", *started)
    for name, latent in started[0].items():
        wide = latent.dtype in (torch.float32, torch.float64)
        require(wide, part, f"{name}: the latent has dtype {latent.dtype}; half precision rounds updates to nothing")
        require(bool(torch.isfinite(latent).all()), part, f"{name}: the latent is not finite")
    # Spread out, as training would: some groups are gone, some stay.
    generator = torch.Generator().manual_seed(2)
    moved = {n: t + spread * torch.randn(t.shape, generator=generator).to(t) for n, t in started[0].items()}
    return Moment(weights, moved, layouts)


def _check_functions(part: Parametrisation, at: Moment) -> None:
    before = [{n: t.clone() for n, t in tensors.items()} for tensors in (at.weights, at.latents)]

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    made: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        "without noise": lambda: part.weights(at, None),
        "under one noise": lambda: part.weights(at, noise()),
        "in the end": lambda: part.final(at)[0],
        "of the masks": lambda: part.final(at)[1],
    }
    for what, make in made.items():
        one, two = make(), make()
        _same(part, f"the weights {what}", one, two)
        for name, value in one.items():
            fits = name in at.weights and value.shape == at.weights[name].shape
            require(fits, part, f"{name}: made {what} in shape {tuple(value.shape)}")
            if what != "of the masks":
                require(value.dtype == at.weights[name].dtype, part, f"{name}: made {what} in {value.dtype}")
                require(bool(torch.isfinite(value).all()), part, f"{name}: not finite {what}")
    final, masks = part.final(at)
    require(at.layouts.keys() <= masks.keys() <= final.keys(), part, f"has masks for {sorted(masks)}")
    for name, mask in masks.items():
        require(mask.dtype == torch.bool, part, f"{name}: the mask has dtype {mask.dtype}")
        gone = final[name][~mask]
        require(not bool(gone.count_nonzero()), part, f"{name}: a pruned weight is not zero")
        require(not bool(torch.signbit(gone).any()), part, f"{name}: a pruned weight is -0.0")
    advanced = part.advance(at)
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in at.latents.items()}
    fits = all(shapes.get(n) == (tuple(t.shape), t.dtype) for n, t in advanced.items())
    require(fits, part, "advance returns other latents than there are")
    for tensors, old in zip((at.weights, at.latents), before, strict=True):
        require(all(torch.equal(t, old[n]) for n, t in tensors.items()), part, "changes its arguments")


def _check_asked(part: Parametrisation, at: Moment) -> None:
    asked, goal = part.asked(at.step), part.asked(None)
    require((asked is None) == (goal is None), part, f"asks for {asked} at step {at.step} and {goal} in the end")
    if asked is None or goal is None:
        return
    require(0.0 <= asked <= goal < 1.0, part, f"asks for {asked} at step {at.step} and {goal} in the end")
    require(at.step < _LATE or asked == goal, part, f"still asks for {asked} long after the end")
    for name, mask in part.final(at)[1].items():
        if name in at.layouts:
            gone = mask.numel() - int(mask.sum())
            require(abs(gone - asked * mask.numel()) <= 0.5, part, f"{name}: asked for {asked}, {gone} weights gone")


def _check_gradients(part: Parametrisation, at: Moment) -> None:
    weights = {n: w.clone().requires_grad_() for n, w in at.weights.items()}
    latents = {n: t.clone().requires_grad_() for n, t in at.latents.items()}
    free = replace(at, weights=weights, latents=latents)
    penalty = part.penalty(free)
    require(penalty.shape == () and bool(torch.isfinite(penalty)), part, f"the penalty is {penalty}")
    made = part.weights(free, torch.Generator().manual_seed(3))
    loss = sum((value * torch.linspace(1, 2, value.numel()).view_as(value)).sum() for value in made.values())
    torch.autograd.backward(loss + penalty)
    for name in at.layouts:
        grad = weights[name].grad
        require(grad is not None and bool(grad.count_nonzero()), part, f"no gradient reaches {name}")
    for name, latent in latents.items():
        require(latent.grad is not None and bool(latent.grad.any()), part, f"no gradient reaches the latent of {name}")
    for name, leaf in (*weights.items(), *latents.items()):
        require(leaf.grad is None or bool(torch.isfinite(leaf.grad).all()), part, f"{name}: gradient not finite")


def _check_network(part: Parametrisation) -> None:
    x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    one = Reparametrised(_net(), part)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
    _train(one, optimizer, x)
    kept = copy.deepcopy((one.state_dict(), optimizer.state_dict()))
    two = Reparametrised(_net(), part)
    two.load_state_dict(kept[0])
    other = torch.optim.SGD(two.parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(kept[1])
    _train(one, optimizer, x)
    _train(two, other, x)
    _same(part, "a resumed training", one.state_dict(), two.state_dict())
    three = copy.deepcopy(one)
    one.eval()
    three.eval()
    with torch.no_grad():
        before = one(x)
        require(bool(torch.equal(before, three(x))), part, "a deep copy answers differently")
        finished = one.finish_()
        require(bool(torch.equal(before, one.model(x))), part, "in evaluation mode it is not the finished network")
    parameters: Tensors = dict(one.model.named_parameters())
    for name, mask in finished.masks.items():
        require(not bool(parameters[name][~mask].any()), part, f"{name}: a pruned weight is not zero in the model")


def _train(model: Reparametrised, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).square().mean() + model.penalty()).backward()
        optimizer.step()
        model.step()


def _same(part: Parametrisation, what: str, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    same = one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())
    require(same, part, f"{what} are not the same every time")
