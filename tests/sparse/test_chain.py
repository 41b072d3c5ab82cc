"""Layers that run in one call of the library, beside the same layers one by one: equal in every bit."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from dense_products import numbers, sparse
from secateur.errors import SparseError
from secateur.sparse import Compiled, Convolution, Panelled, chain, compile, reason
from secateur.sparse.chain import Chain, Step, chained
from secateur.sparse.image_layers import DepthwiseConv2d, ImageLayer, MaxPool2d
from secateur.sparse.images import Blocked
from secateur.sparse.layers import SparseConv2d
from secateur.sparse.library import ACTIVATIONS
from sparse_models import Bottleneck, Mobile, answers, pruned

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())

SAME = (1, 1, 1, 1)


def made(model: nn.Module, *x: Tensor) -> Compiled:
    return compile(pruned(model), x, cache=False, measure=False)


def chains(compiled: Compiled) -> list[Chain]:
    return [module for module in compiled.chained.modules() if isinstance(module, Chain)]


def equal(got: Any, expected: Any) -> bool:
    """Whether nested answers are the same in every bit, whatever lies beside the images."""

    def plain(x: Any) -> list[Tensor]:
        return tree_leaves(x, is_leaf=lambda leaf: isinstance(leaf, Blocked))

    pairs = list(zip(plain(got), plain(expected), strict=True))
    assert all(type(a) is type(b) for a, b in pairs)
    images = ((x.images() if isinstance(x, Blocked) else x for x in pair) for pair in pairs)
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in images)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may run layer by layer."""
    monkeypatch.setattr(Chain, "_one_by_one", lambda *_: pytest.fail("layers were called one by one"))


class Forked(nn.Module):
    """Adds its own input, hands out what is inside, and has torch look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.pool, self.d, self.e = nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1, stride=2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        inner = F.relu(self.b(F.silu(self.a(x))) + x)
        outer = self.c(inner) + y
        end = self.d(self.pool(outer)) + self.e(inner)
        return {"inner": inner, "end": [end], "mean": outer.mean((2, 3)), "wide": torch.cat([inner, outer], 1)}


CASES: list[tuple[str, type[nn.Module], list[tuple[int, ...]], int]] = [
    ("mobile", Mobile, [(2, 3, 24, 24), (1, 3, 40, 17), (3, 3, 6, 90), (2, 3, 70, 70)], 1),
    ("bottleneck", Bottleneck, [(2, 32, 10, 9), (1, 32, 33, 8), (3, 32, 4, 5), (1, 32, 40, 60)], 1),
    ("forked", Forked, [(2, 8, 12, 10), (1, 8, 30, 40), (4, 8, 2, 6)], 2),
]


@pytest.mark.parametrize(("model", "shapes", "count"), [row[1:] for row in CASES], ids=[row[0] for row in CASES])
@pytest.mark.usefixtures("sparse_wins", "at_once")
def test_chained_model_is_the_model_bit_for_bit(
    model: type[nn.Module], shapes: list[tuple[int, ...]], count: int
) -> None:
    compiled = made(model(), *[numbers(*shapes[0], seed=n) for n in range(count)])
    assert sum(len(one.steps) for one in chains(compiled)) >= 5
    for seed, shape in enumerate([*shapes, *shapes]):
        x = [numbers(*shape, seed=seed + n) for n in range(count)]
        before = [one.clone() for one in x]
        expected = answers(compiled.model, *x)
        assert equal(answers(compiled, *x), expected)
        with torch.no_grad():
            assert equal(compiled(*[one.requires_grad_() for one in x]), expected)
        assert equal(x, before)
    torch.set_num_threads(3)
    try:
        assert equal(answers(compiled, *x), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("sparse_wins", "at_once")
def test_inputs_may_lie_in_any_way_and_hold_anything() -> None:
    compiled = made(Mobile(), numbers(2, 3, 24, 24))
    wide = numbers(2, 6, 24, 48)
    for x in (
        wide[:, ::2, :, 7:31],
        wide[:, :3, :, ::2],
        numbers(24, 24, 3, 2).permute(3, 2, 0, 1),
        wide[:1, 3:].expand(2, 3, 24, 48),
    ):
        poisoned = x.clone()
        poisoned[0, 1, 5, 5] = float("inf")
        assert equal(answers(compiled, x), answers(compiled.model, x))
        assert torch.equal(answers(compiled, poisoned).isnan(), answers(compiled.model, poisoned).isnan())


class _Random:
    """A graph of layers on images, of which every value may go into any later layer, in either layout."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.values: list[tuple[fx.Node, tuple[int, int], bool]] = []  # channels, halvings of the image, blocked
        self.inputs = self.random.randint(1, 2)
        for n in range(self.inputs):
            self.values.append((self.graph.placeholder(f"x{n}"), (4, 0), False))
        for n in range(self.random.randint(2, 12)):
            self._add(f"layer_{n}", seed + n)
        some = self.random.sample(self.values[self.inputs :], self.random.randint(1, 2))
        self.graph.output(tuple(node for node, _, _ in [*some, self.values[-1]]))
        self.model = fx.GraphModule(self.modules, self.graph)

    def _add(self, name: str, seed: int) -> None:
        node, (channels, halved), blocked = self.random.choice(self.values[-4:])
        if self.random.random() < 0.15 and not blocked:
            self.values.append((self.graph.call_function(torch.neg, (node,)), (channels, halved), False))
            return
        layer, size = self._layer(channels, halved, seed)
        layer.blocked = self.random.random() < 0.6
        same = [other for other, shape, _ in self.values if shape == size]
        adds = same and self.random.random() < 0.5 and not isinstance(layer, MaxPool2d)
        self.modules[name] = layer.eval()
        args = (node, self.random.choice(same)) if adds else (node,)
        self.values.append((self.graph.call_module(name, args), size, layer.blocked))

    def _layer(self, channels: int, halved: int, seed: int) -> tuple[ImageLayer, tuple[int, int]]:
        stride = self.random.choice([1, 1, 1, 2]) if halved < 2 else 1
        how = self.random.choice([Convolution(stride=(stride, stride)), Convolution((3, 3), (stride, stride), SAME)])
        after = self.random.choice(ACTIVATIONS)
        rows = self.random.choice([4, 4, 8])
        kind = self.random.choice(["conv2d", "conv2d", "depthwise2d", "pool"])
        halved += stride == 2
        if kind == "pool":
            return MaxPool2d(how), (channels, halved)
        bias = self.random.choice([None, 0])
        if kind == "conv2d":
            weight = Panelled.pack(sparse(rows, channels * how.kernel[0] * how.kernel[1], 0.5, seed))
            own = None if bias is None else numbers(rows, seed=seed)
            return SparseConv2d(weight, how, own, activation=after), (rows, halved)
        rows = max(rows, channels)
        weights, own = numbers(rows, 1, *how.kernel, seed=seed), None if bias is None else numbers(rows, seed=seed)
        return DepthwiseConv2d(weights, how, channels, own, activation=after), (rows, halved)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_graph_of_layers_is_the_same_in_one_call(seed: int) -> None:
    made = _Random(seed)
    model = chained(made.model)
    for batch, height, width in ((2, 9, 10), (1, 16, 40), (2, 9, 10)):
        x = [numbers(batch, 4, height, width, seed=seed % 100 + n) for n in range(made.inputs)]
        assert equal(answers(model, *x), answers(made.model, *x))


class Weighted(nn.Module):
    """Adds in a way that no layer takes in, values of which the second is a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.secateur_chain_0 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return torch.add(y, self.secateur_chain_0(y), alpha=2)


@pytest.mark.usefixtures("sparse_wins")
def test_values_may_be_added_outside_a_chain() -> None:
    compiled, x = made(Weighted(), numbers(2, 3, 9, 9)), numbers(2, 3, 9, 9)
    assert len(chains(compiled)) == 1
    assert equal(answers(compiled, x), answers(compiled.model, x))


@pytest.mark.usefixtures("sparse_wins")
def test_what_is_no_chain_stays_as_it_is() -> None:
    x = numbers(2, 3, 6, 6)
    lone = made(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(144, 3)), x)
    assert lone.chained is lone.model
    assert chained(lone.model) is lone.model
    plain = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert chained(plain) is plain


@pytest.mark.usefixtures("sparse_wins")
def test_chain_is_not_a_child_and_changes_no_names() -> None:
    compiled = made(Mobile(), numbers(2, 3, 24, 24))
    names = list(compiled.state_dict())
    answers(compiled, numbers(2, 3, 24, 24))
    assert list(compiled.state_dict()) == names
    assert not any(isinstance(module, Chain) for module in compiled.modules())


@pytest.mark.usefixtures("sparse_wins")
def test_plans_of_a_few_sizes_are_kept() -> None:
    compiled, expected = made(Mobile(), numbers(2, 3, 24, 24)), []
    (one,) = chains(compiled)
    for size in (*range(10, 10 + 2 * chain.SIZES), 10):
        x = numbers(1, 3, size, 20)
        expected.append(equal(answers(compiled, x), answers(compiled.model, x)))
        assert 1 <= len(one._plans.by_size) <= chain.SIZES
    assert all(expected)


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("name", ["stem", "one.around", "three.expand"])
def test_hooks_of_layers_are_called(name: str) -> None:
    compiled, x = made(Mobile(), numbers(2, 3, 24, 24)), numbers(2, 3, 24, 24)
    layer, calls = compiled.model.get_submodule(name), []
    before = answers(compiled, x)
    seen = layer.register_forward_hook(lambda *_: calls.append("after"))
    first = layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    assert equal(answers(compiled, x), before)
    assert calls == ["before", "after"]
    seen.remove()
    first.remove()
    other = layer.register_forward_hook(lambda module, inputs, out: out._replace(data=out.data * 2))
    doubled = answers(compiled, x)
    assert not torch.equal(doubled, before)
    assert equal(doubled, answers(compiled.model, x))
    other.remove()
    assert equal(answers(compiled, x), before)
    assert calls == ["before", "after"]


@pytest.mark.usefixtures("sparse_wins")
def test_hooks_of_the_model_inside_are_called() -> None:
    compiled, calls = made(Mobile(), numbers(2, 3, 24, 24)), []
    compiled.model.register_forward_hook(lambda *_: calls.append("after"))
    answers(compiled, numbers(2, 3, 24, 24))
    assert calls == ["after"]


def _replace(name: str, key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Compiled], None]:
    def act(compiled: Compiled) -> None:
        own = compiled.model.get_submodule(name)._buffers
        old = own[key]
        assert old is not None
        own[key] = change(old)

    return act


def _in_place(name: str, key: str, change: Callable[[Tensor], Any]) -> Callable[[Compiled], None]:
    return lambda compiled: change(compiled.model.get_submodule(name).get_buffer(key))


def _loaded(compiled: Compiled) -> None:
    compiled.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in compiled.state_dict().items()})


CHANGES: list[tuple[str, Callable[[Compiled], None]]] = [
    ("a bias replaced", _replace("one.expand", "bias", lambda b: b + 1)),
    ("a bias in place", _in_place("one.expand", "bias", lambda b: b.add_(1))),
    ("a bias that is not contiguous", _replace("one.expand", "bias", lambda b: torch.stack([b + 1, b], 1)[:, 0])),
    ("no bias any more", lambda compiled: compiled.model.get_submodule("stem")._buffers.update(bias=None)),
    ("a depthwise bias replaced", _replace("two.around", "bias", lambda b: b + 1)),
    ("a depthwise bias in place", _in_place("two.around", "bias", lambda b: b.add_(1))),
    ("depthwise weights replaced", _replace("two.around", "weight", lambda w: w + 1)),
    ("depthwise weights turned", _replace("two.around", "weight", lambda w: (w + 1).transpose(2, 3))),
    ("depthwise weights in place", _in_place("two.around", "weight", lambda w: w.add_(1))),
    ("packed values replaced", _replace("three.expand", "values", lambda v: v * 2 + 1)),
    ("packed values in place", _in_place("three.expand", "values", lambda v: v.mul_(2).add_(1))),
    ("a state loaded", _loaded),
    ("a layer loaded", lambda c: _load_layer(c.model.get_submodule("two.expand"))),
]


def _load_layer(layer: nn.Module) -> None:
    layer.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in layer.state_dict().items()})


@pytest.mark.parametrize("change", [row[1] for row in CHANGES], ids=[row[0] for row in CHANGES])
@pytest.mark.usefixtures("sparse_wins", "at_once")
def test_other_contents_of_buffers_are_noticed(change: Callable[[Compiled], None]) -> None:
    compiled, x = made(Mobile(), numbers(2, 3, 24, 24)), numbers(2, 3, 24, 24)
    before = answers(compiled, x)
    with torch.no_grad():
        change(compiled)
    after = answers(compiled, x)
    assert not torch.equal(after, before)
    assert equal(after, answers(compiled.model, x))


@pytest.mark.usefixtures("sparse_wins")
def test_indices_that_were_changed_are_checked_before_they_are_followed() -> None:
    compiled, x = made(Mobile(), numbers(2, 3, 24, 24)), numbers(2, 3, 24, 24)
    before = answers(compiled, x)
    indices = compiled.model.get_submodule("three.expand").get_buffer("indices")
    kept = indices.clone()
    with torch.no_grad():
        indices.fill_(200)
    with pytest.raises(SparseError, match="damaged"):
        answers(compiled, x)
    with torch.no_grad():
        indices.copy_(kept)
    assert equal(answers(compiled, x), before)


def _two() -> tuple[Chain, DepthwiseConv2d, SparseConv2d]:
    first = DepthwiseConv2d(numbers(4, 1, 3, 3), Convolution((3, 3), padding=SAME), 4)
    second = SparseConv2d(Panelled.pack(sparse(8, 4, 0.5, 1)), Convolution(), numbers(8), activation="relu")
    return Chain(1, [Step(first, 0, None), Step(second, 1, None)], [2]), first, second


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("out", [False, True])
def test_what_comes_from_outside_may_have_either_layout(into: bool, inner: bool, added: bool, out: bool) -> None:
    _, first, second = _two()
    first.blocked, second.blocked = inner, out
    x, residual = numbers(2, 4, 9, 8), numbers(2, 8, 9, 8, seed=1)
    inputs = [Blocked.of(x) if into else x, Blocked.of(residual) if added else residual]
    both = Chain(2, [Step(first, 0, None), Step(second, 2, 1)], [2, 3])
    between = first(inputs[0])
    assert equal(both(*inputs), (between, second(between, inputs[1])))
    own = Convolution((3, 3), padding=SAME)
    last = DepthwiseConv2d(numbers(4, 1, 3, 3, seed=2), own, 4, activation="silu", blocked=out)
    again = Chain(1, [Step(first, 0, None), Step(last, 1, 0)], [2])  # what is added is also what the first one reads
    assert equal(again(inputs[0]), (last(between, inputs[0]),))


@pytest.mark.parametrize("place", [0, 1])
def test_a_bias_that_was_not_there_is_noticed(place: int) -> None:
    both, *layers = _two()
    layers[1]._buffers["bias"] = None
    x = numbers(1, 4, 8, 8)
    assert equal(both(x), (layers[1](layers[0](x)),))
    layers[place]._buffers["bias"] = numbers((4, 8)[place])
    assert equal(both(x), (layers[1](layers[0](x)),))


@pytest.mark.parametrize(
    ("place", "key", "other"),
    [
        (0, "weight", numbers(4, 1, 3, 3).double()),
        (0, "weight", numbers(4, 1, 5, 5)),
        (0, "bias", numbers(4).double()),
        (0, "bias", numbers(5)),
        (1, "bias", numbers(8).double()),
        (1, "bias", numbers(9)),
    ],
)
def test_buffers_that_do_not_fit_are_refused_as_by_the_layer(place: int, key: str, other: Tensor) -> None:
    both, *layers = _two()
    x = numbers(1, 4, 8, 8)
    both(x)
    layers[place]._buffers[key] = other
    with pytest.raises(SparseError) as expected:
        layers[1](layers[0](x))
    with pytest.raises(SparseError) as found:
        both(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.usefixtures("sparse_wins")
def test_a_layer_that_was_replaced_is_noticed() -> None:
    compiled, x = made(Mobile(), numbers(2, 3, 24, 24)), numbers(2, 3, 24, 24)
    answers(compiled, x)
    other = copy.deepcopy(compiled.model.get_submodule("stem"))
    other.get_buffer("bias").add_(1)
    compiled.model.add_module("stem", other)
    assert equal(answers(compiled, x), answers(compiled.model, x))


class Narrow(nn.Module):
    """Kernels that do not fit in every image, and a sum of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.a(x))) + y
        return out


WRONG: list[tuple[str, Callable[[], tuple[Tensor, Tensor]]]] = [
    ("float64", lambda: (numbers(2, 3, 9, 9).double(), numbers(2, 4, 3, 3))),
    ("float16", lambda: (numbers(2, 3, 9, 9), numbers(2, 4, 3, 3).half())),
    ("meta", lambda: (numbers(2, 3, 9, 9).to("meta"), numbers(2, 4, 3, 3))),
    ("sparse", lambda: (numbers(2, 3, 9, 9).to_sparse(), numbers(2, 4, 3, 3))),
    ("channels", lambda: (numbers(2, 5, 9, 9), numbers(2, 4, 3, 3))),
    ("no channels", lambda: (numbers(2, 0, 9, 9), numbers(2, 4, 3, 3))),
    ("too small for the first", lambda: (numbers(2, 3, 4, 9), numbers(2, 4, 3, 3))),
    ("too small for the second", lambda: (numbers(2, 3, 6, 9), numbers(2, 4, 3, 3))),
    ("no pixels", lambda: (numbers(2, 3, 0, 9), numbers(2, 4, 3, 3))),
    ("other size of what is added", lambda: (numbers(2, 3, 9, 9), numbers(2, 4, 3, 4))),
    ("other channels of what is added", lambda: (numbers(2, 3, 9, 9), numbers(2, 3, 3, 3))),
    ("other batch of what is added", lambda: (numbers(2, 3, 9, 9), numbers(1, 4, 3, 3))),
    ("two dimensions", lambda: (numbers(9, 9), numbers(2, 4, 3, 3))),
    ("five dimensions", lambda: (numbers(1, 2, 3, 9, 9), numbers(2, 4, 3, 3))),
    ("gradient", lambda: (numbers(2, 3, 9, 9).requires_grad_(), numbers(2, 4, 3, 3))),
    ("gradient of what is added", lambda: (numbers(2, 3, 9, 9), numbers(2, 4, 3, 3).requires_grad_())),
]


@pytest.mark.parametrize("inputs", [row[1] for row in WRONG], ids=[row[0] for row in WRONG])
@pytest.mark.usefixtures("sparse_wins")
def test_wrong_inputs_are_refused_as_without_the_chain(inputs: Callable[[], tuple[Tensor, Tensor]]) -> None:
    right = (numbers(2, 3, 9, 9), numbers(2, 4, 3, 3))
    compiled = made(Narrow(), *right)
    assert len(chains(compiled)) == 1
    before = answers(compiled, *right)
    with pytest.raises(SparseError) as expected:
        compiled.model(*inputs())
    with pytest.raises(SparseError) as found:
        compiled(*inputs())
    assert str(found.value) == str(expected.value)
    assert equal(answers(compiled, *right), before)


@pytest.mark.usefixtures("sparse_wins")
def test_batches_of_no_images() -> None:
    compiled = made(Narrow(), numbers(2, 3, 9, 9), numbers(2, 4, 3, 3))
    assert answers(compiled, numbers(0, 3, 9, 9), numbers(0, 4, 3, 3)).shape == (0, 4, 3, 3)


@pytest.mark.usefixtures("sparse_wins")
def test_single_images_without_a_batch() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), numbers(2, 3, 9, 9)
    compiled = made(model, x)
    assert answers(compiled, x[1]).shape == (4, 7, 7)


@pytest.fixture
def impatient() -> Iterator[None]:
    """Python goes from thread to thread as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("sparse_wins", "impatient")
@pytest.mark.parametrize(
    "sizes",
    [
        chain.SIZES,
        3 * chain.SIZES,
    ],
)
def test_several_threads_run_the_same_model_at_once(sizes: int) -> None:
    compiled = made(Mobile(), numbers(1, 3, 12, 12))
    inputs = [numbers(1, 3, 8 + n % sizes, 12, seed=n) for n in range(24)]
    expected = [answers(compiled.model, x) for x in inputs]

    def run(number: int) -> bool:
        order = [(number * 5 + i) % len(inputs) for i in range(300)]
        return all(torch.equal(answers(compiled, inputs[i]), expected[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def _pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))  # noqa: S301


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        _pickled,
    ],
)
def test_copies_have_chains_of_their_own(copied: Callable[[Any], Any]) -> None:
    # Graphs of a forward whose annotations are strings cannot be pickled by torch.
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    compiled, x = made(model, numbers(2, 3, 24, 24)), numbers(2, 3, 24, 24)
    before = answers(compiled, x)
    again = copied(compiled)
    assert equal(answers(again, x), before)
    assert chains(again)[0] is not chains(compiled)[0]
    with torch.no_grad():
        again.model.get_submodule("2").get_buffer("bias").add_(1)
    assert not torch.equal(answers(again, x), before)
    assert equal(answers(again, x), answers(again.model, x))
    assert equal(answers(compiled, x), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_chains_are_copied_with_their_layers(copied: Callable[[Any], Any]) -> None:
    one, first, _ = _two()
    x = numbers(1, 4, 8, 8)
    before = one(x)
    again = copied(one)
    first.weight.add_(1)
    assert equal(again(x), before)
    assert not equal(one(x), before)


@pytest.mark.usefixtures("sparse_wins")
def test_models_with_chains_compile_and_export() -> None:
    compiled, x = made(Mobile(), numbers(2, 3, 24, 24)), numbers(2, 3, 24, 24)
    expected = answers(compiled, x)
    torch._dynamo.reset()
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(answers(graph, x), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(compiled, (x,), dynamic_shapes=[({0: batch},)])
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {torch.ops.secateur.sparse_conv2d.default, torch.ops.secateur.depthwise2d.default} <= names
    for other in (x, numbers(5, 3, 24, 24)):
        torch.testing.assert_close(answers(program.module(), other), answers(compiled, other))
    assert equal(answers(compiled, x), expected)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_values_that_are_alive_together_do_not_overlap(seed: int) -> None:
    draw = random.Random(seed)
    inputs, count = draw.randint(1, 3), draw.randint(1, 14)
    layer = MaxPool2d(Convolution())
    steps = []
    for i in range(count):
        residual = draw.choice([None, draw.randrange(inputs + i)])
        steps.append(Step(layer, draw.randrange(max(inputs + i - 3, 0), inputs + i), residual))
    outputs = sorted(draw.sample(range(inputs, inputs + count), draw.randint(1, min(count, 3))))
    sizes = [draw.choice([1, 15, 16, 17, 64, 100, 999]) for _ in range(inputs + count)]
    values = [chain._Value(1, 1, 1, size, False, (1, 1, 1, size)) for size in sizes]
    places, floats = Chain(inputs, steps, outputs)._places(values)
    assert [value for value, place in enumerate(places) if place is None] == [*range(inputs), *outputs]
    where = {v: range(place, place + sizes[v]) for v, place in enumerate(places) if place is not None}
    assert all(cells.start % 16 == 0 and cells.stop <= floats for cells in where.values())
    memory: list[int | None] = [None] * floats  # which value lies there
    for i, step in enumerate(steps):
        read = {v for v in (step.x, step.residual) if v is not None and v in where}
        for value in read:
            assert all(memory[cell] == value for cell in where[value]), "written over before it is read"
        for cell in where.get(inputs + i, ()):
            assert memory[cell] not in read, "written while it is read"
            memory[cell] = inputs + i


def test_memory_is_used_again() -> None:
    layer = MaxPool2d(Convolution())
    steps = [Step(layer, i, None) for i in range(10)]
    values = [chain._Value(1, 1, 1, 64, False, (1, 1, 1, 64))] * 11
    _, floats = Chain(1, steps, [10])._places(values)
    assert floats == 2 * 64
