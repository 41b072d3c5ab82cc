"""What each ATen operator does to labels, one module per family.

A rule reads the labels of the arguments (``call.axes(tensor)``), ties or freezes them in ``call.ledger`` and labels the
results with ``call.put``. An operator without a rule freezes what it touches and is listed in the result.
"""

from secateur.graph.rules import attention, create, elementwise, index, linear, norm, recurrent, reduce, shape, spatial
from secateur.graph.rules._registry import RULES, Rules, rule

__all__ = [
    "RULES",
    "Rules",
    "attention",
    "create",
    "elementwise",
    "index",
    "linear",
    "norm",
    "recurrent",
    "reduce",
    "rule",
    "shape",
    "spatial",
]
