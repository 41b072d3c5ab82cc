"""What single operators leave prunable, asked of the groups that are found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.graph.calls import Call
from secateur.graph.examples import Example
from secateur.graph.rules import RULES, Rules
from secateur.graph.trace import trace
from secateur.structure import find_groups, shrink_, verify
from secateur.targets import Target


class Between(nn.Module):
    """Eight neurons, an operator, and a layer that reads what it gives."""

    def __init__(self, act: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act = act
        self.make, self.read = nn.Linear(4, 8), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.act(self.make(x)))
        return out


def units(act: Callable[[Tensor], Tensor], width: int = 8, *, exact: bool = False) -> int:
    groups = find_groups(Between(act, width), torch.randn(2, 4), exact=exact).groups
    return sum(group.units for group in groups if group.name == "make")


@pytest.mark.parametrize(("dim", "exact", "expected"), [(1, False, 8), (-1, True, 8), (0, False, 8), (-2, True, 0)])
def test_renorm_takes_its_norms_over_the_other_dimensions(dim: int, exact: bool, expected: int) -> None:
    assert units(lambda h: torch.renorm(h, 2, dim, 0.5), exact=exact) == expected


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda h: torch.cat([h[:, :1].squeeze(1)[:, None], h], 1), 7),  # the first stays, its place does not change
        (lambda h: torch.cat([h[:, -1:].flatten()[:, None], h], 1), 7),
        (lambda h: torch.cat([h[:, 3:4].unsqueeze(0)[0], h], 1), 0),  # its place changes with what goes before it
        (lambda h: torch.cat([h[:, 3:4].shape[1] * h, h[:, :1]], 1), 7),  # its values are not used
    ],
    ids=["first", "last", "middle", "shape only"],
)
def test_one_index_by_itself(act: Callable[[Tensor], Tensor], expected: int) -> None:
    assert units(act, 9) == expected
    if expected:
        model, x = Between(act, 9), torch.randn(2, 4)
        dense = Between(act, 9)
        assert shrink_(model, Target("channels", 0.6), x, align=1).proof.equal
        assert verify(dense, model, x).equal


def test_memory_read_in_another_order_is_not_followed() -> None:
    assert units(lambda h: h.contiguous().as_strided((2, 8), (8, 1))) == 8
    assert units(lambda h: h.contiguous().as_strided((2, 8), (1, 2))) == 0


def test_a_rule_that_fails_is_not_blamed_on_the_model() -> None:
    rules = Rules()
    rules._by_name.update(RULES._by_name)

    @rules.add("relu")
    def relu(call: Call) -> None:
        raise KeyError("no such label")

    with pytest.raises(GraphError, match=r"aten::relu: the rule for this operator fails on .*\(2, 8\).*KeyError"):
        trace(Between(torch.relu), [Example((torch.randn(2, 4),), {})], rules=rules)
