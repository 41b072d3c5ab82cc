import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import MetricsError
from secateur.metrics import measure_storage
from secateur.metrics.storage import _DTYPES

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 9), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(list(_DTYPES)), shapes), max_size=8))
def test_sizes_equal_those_of_the_real_file(spec):
    state = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in spec.items() if name != "__metadata__"}
    real = safetensors.torch.save(state)
    found = measure_storage(state)
    assert found.size_bytes == len(real)
    assert found.deflate_bytes == len(zlib.compress(real, 6))


def test_deflate_is_measured_on_the_values():
    layer = nn.Linear(300, 300)
    dense = measure_storage(layer)
    real = safetensors.torch.save(layer.state_dict())
    assert (dense.size_bytes, dense.deflate_bytes) == (len(real), len(zlib.compress(real, 6)))
    with torch.no_grad():
        layer.weight[:, 30:] = 0
    sparse = measure_storage(layer)
    assert sparse.size_bytes == dense.size_bytes
    assert sparse.deflate_bytes < 0.2 * dense.deflate_bytes


def test_views_count_their_own_bytes_and_ties_once():
    big = torch.randn(1000, 1000)
    state = {"row": big[3], "column": big[:, 3], "turned": big[:2].t()}
    real = safetensors.torch.save({name: t.contiguous() for name, t in state.items()})
    assert measure_storage(state).size_bytes == len(real) < 20_000
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    only = safetensors.torch.save({"0.weight": tied[0].weight})
    assert measure_storage(tied).size_bytes == len(only)


def test_sparse_formats_by_hand():
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3).half())
    keep = torch.zeros(6, 10, dtype=torch.bool)
    keep[0, :7] = True
    half = torch.ones(3, 6, dtype=torch.bool)
    found = measure_storage(model, {"0.weight": keep, "1.weight": half})
    biases = 4 * 6 + 2 * 3
    assert found.csr_bytes == biases + (7 * 8 + 4 * 7) + (18 * 6 + 4 * 4)
    assert found.bitmask_bytes == biases + (7 * 4 + 8) + (18 * 2 + 3)  # 60 bits fill 8 bytes, 18 bits 3
    plain = measure_storage(model)
    assert plain.csr_bytes == plain.bitmask_bytes == 4 * 66 + 2 * 21
    assert found.size_bytes == plain.size_bytes
    assert found.to_dict() == {
        "size_bytes": found.size_bytes,
        "deflate_bytes": found.deflate_bytes,
        "modelled": {"csr_bytes": found.csr_bytes, "bitmask_bytes": found.bitmask_bytes},
    }


def test_break_even_points_of_the_method_sheet():
    weight = {"w": torch.zeros(1000, 1000)}
    keep = torch.zeros(1000, 1000, dtype=torch.bool)
    keep[:500] = True
    assert measure_storage(weight, {"w": keep}).csr_bytes == 4_000_000 + 4 * 1001  # 32-bit: half
    keep = torch.ones(1600, 10, dtype=torch.bool)
    keep[:100] = False
    packed = measure_storage({"w": torch.zeros(1600, 10).half()}, {"w": keep})
    assert packed.bitmask_bytes == 2 * 16_000  # fp16: one in sixteen


def test_what_safetensors_cannot_store_is_refused():
    with pytest.raises(MetricsError, match="'extra' is a int"):
        measure_storage({"extra": 3})
    for bad in (torch.zeros(2, device="meta"), torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex128)):
        with pytest.raises(MetricsError, match="safetensors stores dense"):
            measure_storage({"w": bad})
    with pytest.raises(MetricsError, match="did you mean 'w'"):
        measure_storage({"w": torch.zeros(2)}, {"ww": torch.ones(2, dtype=torch.bool)})
