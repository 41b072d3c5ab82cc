"""What is tried when a plan fails: one constraint after the other."""

from __future__ import annotations

from torch import nn

from secateur.errors import GraphError
from secateur.graph.changes import class_name
from secateur.graph.constraints import Constraints
from secateur.graph.repair import Failure, Repair


class Ladder:
    """Adds constraints where a plan failed: equal sizes, fixed splits, all of a kind of module, then its parent."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self.constraints = Constraints()
        self._rungs = self.constraints.equal, self.constraints.splits, self.constraints.whole
        self.reasons: dict[str, str] = {}
        self.last = ""
        self.counts: bool | None = None  # whether numbers of experts were changed that no code had tripped over

    def climb_from(self, failure: Failure, repair: Repair) -> None:
        """Constrain where a forward stopped."""
        self.climb(next(iter(failure.module(repair.names)), ""), failure.message)

    def climb(self, module: str, why: str) -> None:
        """Add the next constraint for a module and others of its class: all, or after the first those of its size.

        PyTorch's own layers follow their weights: it is the module around them whose code is in the way.

        Raises:
            GraphError: When everything is constrained already.
        """
        while module and type(self._modules[module]).__module__.startswith("torch.nn.modules."):
            module = module.rpartition(".")[0]
        self.last = f"{module or 'the model itself'}: {why}"
        if self.counts:  # one of them may be something else
            self.counts = False
            return
        while True:
            kind = type(self._modules[module])
            name = class_name(self._modules[module])
            alike = [n for n, m in self._modules.items() if type(m) is kind]
            reason = f"{module or 'the model'} ({kind.__name__}): {why}"
            rung = next((r for r in self._rungs if module not in r), None)
            if rung is not None:
                if rung is not self._rungs[0]:
                    alike = [n for n in alike if self._sizes(n) == self._sizes(module)]
                rung.update(dict.fromkeys(alike, reason))
                break
            if not module:
                raise GraphError(
                    f"{class_name(self._model)} cannot be pruned structurally: {self.last}. Nothing was changed"
                )
            module = module.rpartition(".")[0]
        self.reasons[name] = reason

    def _sizes(self, module: str) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tuple(tensor.shape)) for name, tensor in self._modules[module].named_parameters()]
