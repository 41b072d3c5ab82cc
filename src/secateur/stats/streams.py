"""How far residual blocks turn the stream that passes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError
from secateur.forward import attention_fast_path, undisturbed
from secateur.stats._common import LossFn, call_loss


def collect_turns(
    model: nn.Module, blocks: Sequence[str], loss_fn: LossFn, batches: Iterable[Any] | Callable[[], Iterable[Any]]
) -> Tensor:
    r"""Average, per block, :math:`1 - \cos(x, y)` of its input and output over all positions of all batches.

    The model runs in evaluation mode, without gradients. Cosines are taken in float64.

    Args:
        model: The model.
        blocks: Qualified names of modules that return a stream in the shape of the first tensor they get.
        loss_fn: Runs the model on a batch; what it returns is not used.
        batches: The batches.

    Returns:
        Shape (blocks,), in [0, 2].

    Raises:
        MissingStatsError: When there are no batches, or a block did not run.
    """
    place = {id(model.get_submodule(name)): i for i, name in enumerate(blocks)}
    total = torch.zeros(len(blocks), dtype=torch.float64)
    count = torch.zeros(len(blocks), dtype=torch.float64)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        before = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        after = out[0] if isinstance(out, tuple | list) else out
        dim = 1 if before.dim() == 4 else -1
        turn = 1.0 - torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=dim)
        total[place[id(module)]] += float(turn.sum())
        count[place[id(module)]] += turn.numel()

    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in blocks]
    ran = 0
    try:
        with undisturbed(model), attention_fast_path(enabled=False), torch.no_grad():
            for batch in batches() if callable(batches) else batches:
                call_loss(loss_fn, model, batch, ran)
                ran += 1
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise MissingStatsError("the score looks at how blocks turn their stream, but there were no batches to run")
    if not bool(count.all()):
        idle = [name for name, n in zip(blocks, count.tolist(), strict=True) if not n]
        raise MissingStatsError(f"no batch ran {', '.join(idle)}, so nothing is known of its influence")
    return total / count
