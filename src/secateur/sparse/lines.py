"""Convolutions along a line: to the kernels, images that are one pixel high."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from secateur.sparse.known import hooked
from secateur.sparse.plain import replace_


class LineConv1d(nn.Conv1d):
    """A convolution along a line, as one of images that are one pixel high.

    Attributes:
        conv: Of the images.
    """

    conv: nn.Module

    @classmethod
    def of(cls, module: nn.Conv1d) -> LineConv1d:
        """Return a layer with the weights and settings of torch's; its settings can be looked at as before."""
        line = cls.__new__(cls)
        line.__dict__ = module.__dict__ | {"_parameters": {}, "_modules": {}}
        padding = module.padding if isinstance(module.padding, str) else (0, *module.padding)
        line.conv = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            (1, *module.kernel_size),  # type: ignore[arg-type]
            (1, *module.stride),  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            (1, *module.dilation),  # type: ignore[arg-type]
            module.groups,
            module.bias is not None,
            device="meta",
        )
        line.conv.weight = nn.Parameter(module.weight.detach().unsqueeze(2), requires_grad=False)
        line.conv.bias = module.bias
        line.conv.eval()
        return line

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """As torch's layer has it."""
        weight: Any = self.conv.weight
        return weight.reshape(self.out_channels, -1, *self.kernel_size)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """As torch's layer has it."""
        return self.conv.bias

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[batch, outputs, positions]``."""
        out: Tensor = self.conv(input.unsqueeze(-2)).squeeze(-2)
        return out


def as_images_(model: nn.Module) -> None:
    """Put convolutions of images in the place of those along a line."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Conv1d and module.padding_mode == "zeros" and not hooked(module):
            replace_(model, name, LineConv1d.of(module))


def keep_images_(graph: fx.Graph, convolutions: set[str], works_on_single_values: Callable[[fx.Node], bool]) -> None:
    """Let what works on single values work on images one pixel high, from one convolution to the next.

    A convolution along a line ends by taking the height away, and begins by bringing it back. It is taken away behind
    what follows, until nothing is left between the two.

    Args:
        graph: Of a model whose lines became images.
        convolutions: Names of these.
        works_on_single_values: Whether a node is a function of single values of one tensor, or of two alike.
    """
    images: dict[fx.Node, fx.Node] = {}  # by what is left of them without their height
    for node in list(graph.nodes):
        given = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if _is(node, "squeeze") and given[0].op == "call_module" and given[0].target in convolutions:
            images[node] = given[0]
        elif _is(node, "unsqueeze") and given[0] in images:
            node.replace_all_uses_with(images[given[0]])
            graph.erase_node(node)
        elif given and all(arg in images for arg in given) and works_on_single_values(node):
            with graph.inserting_before(node):
                image = graph.node_copy(node, lambda arg: images[arg])
                line = graph.call_method("squeeze", (image, -2))
            images[line] = image
            node.replace_all_uses_with(line)
            graph.erase_node(node)
    for line in reversed(list(images)):
        if not line.users:
            graph.erase_node(line)


def _is(node: fx.Node, method: str) -> bool:
    return node.op == "call_method" and node.target == method and node.args[1:] == (-2,) and not node.kwargs
