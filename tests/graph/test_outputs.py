"""What a forward returns may be any object: its tensors keep their shape, and are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.graph.compare import compare
from secateur.graph.outputs import fixed_outputs
from secateur.graph.trees import leaves, mapped, tensors
from secateur.structure import shrink_
from secateur.targets import Target


@dataclass
class Both:
    features: Tensor
    answer: Tensor


class Pair(NamedTuple):
    features: Tensor
    answer: Tensor


class Bag:
    """An object of a class that nobody has registered anywhere."""

    def __init__(self, features: Tensor, answer: Tensor) -> None:
        self.inner = {"features": features}
        self.answer = [answer]
        self.itself = self


@dataclass
class Batch:
    x: Tensor
    name: str = "batch"


class Net(nn.Module):
    def __init__(self, result: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 32), nn.Linear(32, 4)
        self.result = result

    def forward(self, x: Tensor | Batch) -> Any:
        x = x.x if isinstance(x, Batch) else x
        features = self.b(torch.relu(self.a(x)))
        return self.result(features, self.c(torch.relu(features)))


@pytest.mark.parametrize(
    "result",
    [Both, Pair, Bag, lambda f, a: SimpleNamespace(f=f, a=a), lambda f, a: [{"f": f}, Both(a, a)]],
    ids=["dataclass", "named tuple", "own class", "namespace", "nested"],
)
def test_outputs_in_any_object_keep_their_shape_and_are_compared(result: Callable[[Tensor, Tensor], Any]) -> None:
    torch.manual_seed(0)
    net = Net(result)
    before = [t.shape for t in tensors(net(torch.randn(2, 16)))]
    report = shrink_(net, Target("macs", 0.6), torch.randn(2, 16))
    assert [t.shape for t in tensors(net(torch.randn(2, 16)))] == before
    assert net.a.out_features < 64
    assert report.proof.scale > 0


@pytest.mark.parametrize("result", [lambda f, a: None, lambda f, a: 3, lambda f, a: (i for i in (f, a))])
def test_a_forward_without_tensors_is_refused(result: Callable[[Tensor, Tensor], Any]) -> None:
    torch.manual_seed(0)
    net = Net(result)
    with pytest.raises(GraphError, match="without a tensor in it"):
        shrink_(net, Target("macs", 0.6), torch.randn(2, 16))
    assert net.a.out_features == 64


def test_inputs_in_a_dataclass() -> None:
    torch.manual_seed(0)
    net = Net(lambda f, a: a)
    batch = Batch(torch.randn(3, 16))
    report = shrink_(net, Target("macs", 0.6), (batch,))
    assert report.proof.inputs == 3  # the example, one sample less, one sample
    assert report.proof.equal
    assert net(Batch(torch.randn(5, 16))).shape == (5, 4)


def test_numbers_among_the_outputs_are_compared_except_for_widths() -> None:
    torch.manual_seed(0)
    net = Net(lambda f, a: (a, f.shape[1], float(a.detach().sum()), "name"))
    report = shrink_(net, Target("macs", 0.5), torch.randn(2, 16))
    assert report.proof.equal
    assert net(torch.randn(2, 16))[1] < 32
    tensor = torch.ones(2)
    assert compare([[tensor, 1.0]], [[tensor, 1.0 + 1e-6]])[0] > 1e-7
    assert compare([[tensor, float("nan"), True, "a"]], [[tensor, float("nan"), True, "a"]])[0] == 0
    assert compare([[tensor, 32]], [[tensor, 24]])[0] == float("inf")
    assert compare([[tensor, 32]], [[tensor, 24]], {(32, 24)})[0] == 0
    assert compare([[tensor, True]], [[tensor, False]])[0] == float("inf")


def test_what_only_the_model_reads_at_its_next_call_may_shrink() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    assert fixed_outputs({"last_hidden_state": a, "past_key_values": (b,)}) == [a]
    assert fixed_outputs({"past_key_values": (b,)}) == [b]
    assert fixed_outputs(SimpleNamespace(logits=a, hidden_states=(b, b))) == [a]


def test_mapping_copies_objects() -> None:
    batch = Batch(torch.zeros(2))
    twin = mapped(lambda v: v + 1 if isinstance(v, Tensor) else v, {"deep": [batch]})
    assert leaves(twin) == [twin["deep"][0].x, "batch"]
    assert float(batch.x.sum()) == 0
    assert float(twin["deep"][0].x.sum()) == 2
