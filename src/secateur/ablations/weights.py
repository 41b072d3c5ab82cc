"""The masks stay, the weights start anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.errors import RecipeError, WeightError, check_whole
from secateur.masks import apply_masks_, check_masks
from secateur.types import Masks, Pattern, Tensors, Weight


@dataclass(frozen=True)
class Reinitialise:
    r"""Draw all weights anew after the last pruning step, and keep the masks.

    .. math:: W \leftarrow M \odot W_0', \qquad W_0' \sim \text{the initialisation of each module}

    The control of a lottery ticket: is it the structure that was found, or the weights that grew into it? Every module
    is reset by its own ``reset_parameters``, batch norms with their statistics, and the optimizer forgets. What follows
    is a training from scratch, so let it be as long as one: ``weight_rewinding`` with ``rewind_to = 0`` repeats the
    whole schedule of the training. Batch norms are not re-matched to weights that are gone. A network that fills its
    weights in its own constructor starts from the modules' defaults here.

    Args:
        seed: Seed of the new weights.

    Raises:
        RecipeError: With a schedule in steps or epochs, whose training would have to start again half-way.

    References:
        Jonathan Frankle, Michael Carbin, The Lottery Ticket Hypothesis, 2019 (random reinitialisation); Zhuang Liu,
        Mingjie Sun, Tinghui Zhou, Gao Huang, Trevor Darrell, Rethinking the Value of Network Pruning, 2019.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("reinitialise: seed", self.seed, least=0)

    @property
    def restarts(self) -> bool:
        """Yes, after the last pruning step."""
        return True

    def check(self, pattern: object, *, rounds: bool) -> None:
        """Refuse a schedule that prunes while the network trains.

        Raises:
            RecipeError: Says what to use.
        """
        if not rounds:
            raise RecipeError(
                "prune.ablate 'reinitialise' starts a training from scratch, and a schedule in steps or epochs ends in "
                "the middle of one: use a schedule with unit = 'rounds'"
            )

    def masks(self, weights: Mapping[str, Weight], pattern: Pattern, masks: Masks, previous: Tensors | None) -> Masks:
        """Return the method's own masks."""
        return masks

    def restart_(self, model: nn.Module) -> None:
        """Draw all weights anew; the masks must be applied again."""
        reinitialise_(model, seed=self.seed)


def reinitialise_(model: nn.Module, *, seed: int, masks: Tensors | None = None) -> None:
    """Reset every module by its own ``reset_parameters``, in the order in which a constructor makes them.

    Where a network leaves its initialisation to its modules, this gives the very bits that its constructor gives
    after ``torch.manual_seed(seed)``. The global random generators are left as they were.

    Args:
        model: The model, changed in place; parameters keep their identity.
        seed: Seed of the new weights.
        masks: Applied afterwards.

    Raises:
        WeightError: When a module has parameters of its own and cannot reset them, by name; or when a mask does not
            belong to the model. Nothing was changed then.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> reinitialise_(model, seed=1)
        >>> _ = torch.manual_seed(1)
        >>> torch.equal(model.weight, nn.Linear(3, 2).weight)
        True
    """
    check_whole("reinitialise: seed", seed, least=0)
    check_masks(model, masks or {})
    owners = [(name, module) for name, module in _in_order("", model) if _owns(module)]
    without = [f"{name or 'the model'} ({type(m).__name__})" for name, m in owners if _reset_of(m) is None]
    if without:
        raise WeightError(
            f"these modules have parameters and no reset_parameters, so they cannot be initialised anew: "
            f"{', '.join(without)}. Give them one, which draws their weights as their constructor does"
        )
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        torch.manual_seed(seed)
        for _, module in owners:
            reset = _reset_of(module)
            if reset is not None:
                reset()
    apply_masks_(model, masks or {})


def _in_order(name: str, module: nn.Module, seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children before the module that holds them: it may overwrite what they drew."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    for child_name, child in module.named_children():
        yield from _in_order(f"{name}.{child_name}" if name else child_name, child, seen)
    yield name, module


def _owns(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # attention has the second
        reset = getattr(module, name, None)
        if callable(reset):
            return reset  # type: ignore[no-any-return]
    return None
