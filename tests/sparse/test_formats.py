"""Packed weights: there and back, and what a damaged or hostile file makes of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_products import (
    assert_close,
    blocks,
    dense_linear,
    densities,
    kinds,
    linear_sizes,
    numbers,
    pack,
    panels,
    parts,
    seeds,
    sparse,
)
from secateur.errors import SparseError
from secateur.sparse import Bitmask, Csr, Panelled, SparseLinear, linear, nbytes, reason
from secateur.sparse.formats import FORMATS, LEAST_ROWS, PART_ROWS, parts_for

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 150),
    density=densities,
    kind=kinds,
    block=blocks,
    panel=panels,
    pieces=parts,
    seed=seeds,
)
def test_what_is_packed_comes_back(
    rows: int, columns: int, density: float, kind: str, block: tuple[int, int], panel: int, pieces: int, seed: int
) -> None:
    weight = sparse(rows, columns, density, seed)
    packed = pack(kind, weight, block, panel, pieces)
    assert torch.equal(packed.to_dense(), weight)
    again = FORMATS[kind].from_tensors(packed.header(), packed.tensors())
    assert torch.equal(again.to_dense(), weight)
    assert (again.rows, again.columns) == (rows, columns)
    assert nbytes(packed) == sum(t.numel() * t.element_size() for t in packed.tensors().values())


@pytest.mark.parametrize("kind", ["panelled", "bitmask", "csr"])
def test_special_weights_come_back(kind: str) -> None:
    weight = torch.tensor([[float("nan"), 0.0, float("inf")], [-float("inf"), 1e-45, -0.0]])
    back = pack(kind, weight, (1, 1), 2, 1).to_dense()
    assert torch.equal(back.isnan(), weight.isnan())
    assert torch.equal(back.nan_to_num(), weight.nan_to_num())


def test_dimensions_behind_the_second_are_columns() -> None:
    weight = sparse(4, 18, 0.5, 1)
    for form in (Panelled, Bitmask, Csr):
        assert torch.equal(form.pack(weight.view(4, 2, 3, 3)).to_dense(), weight)
        assert torch.equal(form.pack(weight.t().contiguous().t()).to_dense(), weight)


def test_bytes_are_what_the_docstrings_say() -> None:
    weight = sparse(512, 1024, 0.1, 1)
    dense = weight.numel() * 4
    assert nbytes(Panelled.pack(weight)) / dense == pytest.approx(0.13, abs=0.01)
    density = float(weight.count_nonzero()) / weight.numel()
    assert nbytes(Csr.pack(weight)) == 8 * int(weight.count_nonzero()) + 4 * 513
    assert nbytes(Bitmask.pack(weight)) / weight.numel() == pytest.approx(1 / 8 + 4 * density, rel=0.03)


# Every array and every number, and what may become of it.
ARRAYS = {kind: tuple(form.DTYPES) for kind, form in FORMATS.items()}
HURTING = (-1, 0, 1, 2, 3, 4, 255, 256, 65536, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**40 + 1, 2**63, 2**64 + 6)


def damaged(kind: str, packed: Any, data: st.DataObject) -> tuple[dict[str, int], dict[str, Tensor]]:
    header, arrays = packed.header(), {name: tensor.clone() for name, tensor in packed.tensors().items()}
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(header)))
            step = data.draw(st.sampled_from([-4, -1, 1, 4]))
            header[name] = data.draw(st.sampled_from([*HURTING, header[name] + step]))
            continue
        name = data.draw(st.sampled_from(ARRAYS[kind]))
        change = data.draw(st.sampled_from(["byte", "shorter", "longer"]))
        array = arrays[name]
        if change == "shorter":
            arrays[name] = array[: max(array.numel() - data.draw(st.integers(1, 3)), 0)].clone()
        elif change == "longer":
            arrays[name] = torch.cat([array, array.new_zeros(data.draw(st.integers(1, 3)))])
        elif array.numel():
            raw = array.view(torch.uint8)
            raw[data.draw(st.integers(0, raw.numel() - 1))] = data.draw(st.integers(0, 255))
    return header, arrays


@settings(max_examples=600, deadline=None)
@given(
    rows=st.integers(0, 12),
    columns=st.sampled_from([0, 1, 5, 18, 64, 65, 130]),
    density=densities,
    kind=kinds,
    block=blocks,
    panel=panels,
    seed=seeds,
    data=st.data(),
)
def test_damage_is_refused_or_harmless(
    rows: int,
    columns: int,
    density: float,
    kind: str,
    block: tuple[int, int],
    panel: int,
    seed: int,
    data: st.DataObject,
) -> None:
    packed = pack(kind, sparse(rows, columns, density, seed), block, panel, 3)
    header, arrays = damaged(kind, packed, data)
    try:
        read = FORMATS[kind].from_tensors(header, arrays)
    except SparseError:
        return
    if max(read.rows, 1) * max(read.columns, 1) > 2**24:  # sound, since nearly empty, and too large for this test
        return
    weight = read.to_dense()
    assert weight.shape == (read.rows, read.columns)
    x = numbers(3, read.columns, seed=seed)
    huge = bool((weight.abs() > 1e30).any())  # a damaged value may overflow in float32
    for vectors in (x, x[:1]):
        got = linear(vectors, read, threads=2)
        if not huge:
            assert_close(
                got, dense_linear(vectors, weight, None, None, "none"), linear_sizes(vectors, weight, None, None)
            )


def test_missing_and_misshapen_arrays_are_named() -> None:
    packed = Panelled.pack(sparse(6, 10, 0.5, 1))
    header, arrays = packed.header(), packed.tensors()
    wrong: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "no array": (header, {**arrays, "runs": None}, "'runs' is missing"),
        "no number": ({k: v for k, v in header.items() if k != "parts"}, arrays, "'parts' is missing"),
        "a text": ({**header, "rows": "6"}, arrays, "rows must be a whole number of at least 0, got '6'"),
        "a fraction": ({**header, "rows": 6.0}, arrays, "got 6.0"),
        "a truth value": ({**header, "parts": True}, arrays, "got True"),
        "negative": ({**header, "rows": -6}, arrays, "rows must be a whole number of at least 0, got -6"),
        "beyond 64 bits": (
            {**header, "rows": 2**64 + 6},
            arrays,
            "rows is 18446744073709551622, and cannot be more than",
        ),
        "beyond 32 bits": (
            {**header, "parts": 2**32 + 4},
            arrays,
            "parts is 4294967300, and cannot be more than 2147483647",
        ),
        "a dtype": (header, {**arrays, "starts": arrays["starts"].int()}, r"'starts'.*torch\.int64.*got torch\.int32"),
        "two dimensions": (header, {**arrays, "order": arrays["order"].view(1, -1)}, "'order'.*one-dimensional"),
        "strided": (header, {**arrays, "order": arrays["order"].repeat_interleave(2)[::2]}, "'order'.*contiguous"),
        "no layout": (header, {**arrays, "values": arrays["values"].to_sparse()}, "'values'.*contiguous"),
        "on meta": (header, {**arrays, "values": arrays["values"].to("meta")}, "'values'.* on meta"),
        "a block": ({**header, "block_rows": 2}, arrays, "blocks of 2x1"),
        "a panel": ({**header, "panel": 0}, arrays, "in panels of 0"),
    }
    for numbers_, tensors, message in wrong.values():
        with pytest.raises(SparseError, match=message):
            Panelled.from_tensors(numbers_, tensors)


def test_arrays_that_begin_anywhere_are_read() -> None:
    packed = Bitmask.pack(sparse(9, 70, 0.3, 1))
    shifted = {}
    for name, tensor in packed.tensors().items():
        raw = torch.zeros(tensor.numel() * tensor.element_size() + 1, dtype=torch.uint8)
        raw[1:] = tensor.view(torch.uint8)
        shifted[name] = torch.frombuffer(raw.numpy(), dtype=tensor.dtype, offset=1, count=tensor.numel())
        assert shifted[name].data_ptr() % tensor.element_size()
    assert torch.equal(Bitmask.from_tensors(packed.header(), shifted).to_dense(), packed.to_dense())


@pytest.mark.parametrize("kind", ["panelled", "bitmask", "csr"])
def test_copies_and_pickles_stand_alone(kind: str) -> None:
    weight = sparse(9, 20, 0.4, 1)
    packed = pack(kind, weight, (1, 1), 8, 2)
    x = numbers(4, 20)
    expected = linear(x, packed)
    twins = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]  # noqa: S301  # our own bytes
    packed.values.zero_()
    for twin in twins:
        assert torch.equal(twin.to_dense(), weight)
        assert torch.equal(linear(x, twin), expected)


def test_arrays_changed_in_place_are_checked_again() -> None:
    layer = SparseLinear(Panelled.pack(sparse(8, 300, 0.3, 1)))
    x = numbers(2, 300)
    before = layer(x)
    layer.get_buffer("values").mul_(2.0)
    assert torch.equal(layer(x), before * 2)
    layer.get_buffer("indices").fill_(255)
    with pytest.raises(SparseError, match="damaged"):
        layer(x)


def test_replaced_arrays_are_checked() -> None:
    layer = SparseLinear(Panelled.pack(sparse(8, 300, 0.3, 1)))
    layer.order = torch.full_like(layer.get_buffer("order"), 7)
    with pytest.raises(SparseError, match="damaged"):
        layer(numbers(2, 300))


@given(
    rows=st.integers(0, 20000),
    positions=st.sampled_from([1, 8, 16, 49, 64, 196, 784, 12544]),
    threads=st.integers(1, 9),
)
def test_a_weight_has_parts_for_caches_and_threads(rows: int, positions: int, threads: int) -> None:
    parts = parts_for(rows, positions, threads)
    sums = -(-rows // parts) * min(max(positions, 16), 64)
    assert sums <= PART_ROWS * 64
    assert parts <= parts_for(rows, positions) + threads - 1
    few = positions <= 4 * 64 * threads and rows >= LEAST_ROWS * threads
    assert not few or parts % threads == 0
    assert few or parts == parts_for(rows, positions)
