"""Masks hold against every optimizer, and are refused where they do not belong."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from secateur.errors import WeightError
from secateur.masks import MaskHook, apply_masks_, check_masks, clear_optimizer_state_, parameters_of

Make = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda ps: SGD(ps, 0.1),
    "SGD with momentum and decay": lambda ps: SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
    "SGD with Nesterov": lambda ps: SGD(ps, 0.1, momentum=0.9, nesterov=True),
    "fused SGD": lambda ps: SGD(ps, 0.1, momentum=0.9, fused=True),
    "foreach SGD": lambda ps: SGD(ps, 0.1, momentum=0.9, foreach=True),
    "Adam with amsgrad": lambda ps: torch.optim.Adam(ps, 0.01, amsgrad=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.01, weight_decay=0.1),
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, 0.01, fused=True),
    "NAdam": lambda ps: torch.optim.NAdam(ps, 0.01),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.01, centered=True, momentum=0.9),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.1),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps),
    "Rprop": lambda ps: torch.optim.Rprop(ps),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, 0.1, max_iter=3, history_size=4),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def masks_of(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = ["0.weight", "0.bias", "2.weight"]
    return {n: torch.rand(model.get_parameter(n).shape, generator=generator) < density for n in names}


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
    dtype = next(model.parameters()).dtype

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def leaks(model: nn.Module, masks: dict[str, Tensor]) -> int:
    """Pruned weights that are not zero."""
    return sum(int(model.get_parameter(name)[~mask].count_nonzero()) for name, mask in masks.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("warm", [0, 5])
def test_pruned_weights_stay_zero(name: str, warm: int) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, warm)  # momentum that pushes against the mask
    masks = masks_of(model)
    apply_masks_(model, masks)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    MaskHook(model, masks).attach(optimizer)
    for _ in range(20):
        train(model, optimizer, 1)
        assert leaks(model, masks) == 0
    for n, p in model.named_parameters():
        mask = masks.get(n, torch.ones_like(p, dtype=torch.bool))
        assert not torch.equal(p[mask], before[n][mask]), f"{n}: the survivors must have trained"


def test_without_the_hook_they_do_not() -> None:
    """What the tests above would look like if the hook did nothing."""
    model = network()
    optimizer = OPTIMIZERS["SGD with momentum and decay"](list(model.parameters()))
    masks = masks_of(model)
    apply_masks_(model, masks)
    train(model, optimizer, 1)
    assert leaks(model, masks) > 10


def test_the_survivors_train_as_if_the_gradient_were_masked() -> None:
    """SGD without momentum: masking after the step is the same as masking the gradient, bit for bit."""
    model = network()
    masks = masks_of(model)
    apply_masks_(model, masks)
    other = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), 0.1)
    MaskHook(model, masks).attach(optimizer)
    train(model, optimizer, 10)
    for name, mask in masks.items():
        other.get_parameter(name).register_hook(lambda g, m=mask: g * m)
    train(other, SGD(other.parameters(), 0.1), 10)
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    masks = masks_of(model)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    MaskHook(model, masks).attach(optimizer)
    train(model, optimizer, 5)
    assert leaks(model, masks) == 0
    assert all(p.dtype == dtype for p in model.parameters())


def test_the_hook_survives_a_change_of_dtype() -> None:
    model = network()
    masks = masks_of(model)
    optimizer = SGD(model.parameters(), 0.1)
    MaskHook(model, masks).attach(optimizer)
    model.double()
    train(model, optimizer, 2)
    assert leaks(model, masks) == 0
    assert next(model.parameters()).dtype == torch.float64


def test_gradients_stay_dense() -> None:
    model = network()
    mask = masks_of(model)["0.weight"]
    optimizer = SGD(model.parameters(), 0.1)
    MaskHook(model, {"0.weight": mask}).attach(optimizer)
    train(model, optimizer, 2)
    assert bool(model[0].weight.grad[~mask].all())


def test_detaching_lets_go() -> None:
    model = network()
    masks = masks_of(model)
    optimizer = SGD(model.parameters(), 0.1)
    detach = MaskHook(model, masks).attach(optimizer)
    detach()
    train(model, optimizer, 1)
    assert leaks(model, masks) > 0


def test_refresh_follows_the_dict() -> None:
    model = network()
    masks: dict[str, Tensor] = {}
    optimizer = SGD(model.parameters(), 0.1)
    hook = MaskHook(model, masks)
    hook.attach(optimizer)
    train(model, optimizer, 1)
    masks.update(masks_of(model))
    hook.refresh()
    train(model, optimizer, 1)
    assert leaks(model, masks) == 0
    masks.clear()
    hook.refresh()
    train(model, optimizer, 1)
    assert leaks(model, masks_of(model)) > 0


def test_applying_clears_nan_and_minus_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[torch.nan, -3.0], [torch.inf, 2.0]]))
    apply_masks_(model, {"weight": torch.tensor([[False, False], [False, True]])})
    assert model.weight.tolist() == [[0.0, 0.0], [0.0, 2.0]]
    assert not bool(torch.signbit(model.weight).any())


def test_non_contiguous_weights() -> None:
    model = nn.Linear(4, 6, bias=False)
    model.weight = nn.Parameter(torch.randn(4, 6).t())
    mask = torch.rand(6, 4) < 0.5
    apply_masks_(model, {"weight": mask})
    assert torch.equal(model.weight != 0, mask)
    optimizer = SGD(model.parameters(), 0.1)
    MaskHook(model, {"weight": mask}).attach(optimizer)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert leaks(model, {"weight": mask}) == 0


# --- optimizer state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("SGD", "LBFGS")])
def test_state_is_cleared_where_the_mask_is_false(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    masks = masks_of(model)
    changed = clear_optimizer_state_(optimizer, model, masks)
    assert changed > 0
    names = [n for n, _ in model.named_parameters()]
    for index, entries in optimizer.state_dict()["state"].items():
        parameter = model.get_parameter(names[index])
        for key, value in entries.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                assert torch.as_tensor(value).equal(torch.as_tensor(before[index][key])), f"{key} is not per element"
                continue
            mask = masks.get(names[index], torch.ones_like(parameter, dtype=torch.bool))
            assert int(value[~mask].count_nonzero()) == 0
            assert torch.equal(value[mask], before[index][key][mask])


def test_optimizer_without_state() -> None:
    model = network()
    assert clear_optimizer_state_(SGD(model.parameters(), 0.1, momentum=0.9), model, masks_of(model)) == 0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"0.wieght": torch.ones(8, 6, dtype=torch.bool)}, "did you mean '0.weight'"),
        ({"0.weight": torch.ones(6, 8, dtype=torch.bool)}, r"\(6, 8\) on a weight of \(8, 6\)"),
        ({"0.weight": torch.ones(8, 6)}, r"float32; expected torch\.bool"),
    ],
)
def test_masks_of_another_model(masks: dict[str, Tensor], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightError, match=message):
        check_masks(model, masks)
    good = masks_of(model)
    with pytest.raises(WeightError, match=message):
        apply_masks_(model, {**good, **masks})
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()), "nothing changes on a refusal"


def test_tied_names_are_known() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert parameters_of(model, {"1.weight": 0})["1.weight"] is first.weight
