"""What a model is made of, against hand counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.errors import MetricsError, WeightError
from secateur.inspection import VECTOR, inspect_model
from secateur.method import Method
from secateur.patterns import Channel
from secateur.pruner import prune_
from secateur.targets import Target


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.zeros(7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.head(self.attention(x, x, x)[0])


def test_rows_add_up_to_the_totals():
    seen = inspect_model(Tied(), inputs=(torch.zeros(1, 3, dtype=torch.int64),))
    assert seen.params == sum(p.numel() for p in Tied().parameters()) == 40 + 48 + 12 + 16 + 4
    assert sum(row.share for row in seen.rows) == pytest.approx(1.0)
    # Three tokens: in_proj 4x12, out_proj 4x4 and head 4x10 each; QK^T and AV are 3x3x4 each and nobody's weight.
    assert {row.name: row.macs for row in seen.rows if row.macs} == {
        "attention.in_proj_weight": 144,
        "attention.out_proj.weight": 48,
        "head.weight": 120,
    }
    assert seen.macs.unattributed == 72
    assert sum(row.macs for row in seen.rows) + 72 == seen.macs.dense
    assert "aten.embedding" in seen.to_dict()["not_counted"]["operators"]
    assert seen.buffers == 7


def test_a_tied_weight_is_one_row_under_the_name_that_pruning_uses():
    seen = inspect_model(Tied())
    row = next(r for r in seen.rows if r.name == "head.weight")
    assert (row.prunable, row.type, row.params) == (True, "Linear", 40)
    assert seen.ties == {"embedding.weight": "head.weight"}


def test_every_row_that_is_not_prunable_says_why():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.LayerNorm(2))
    seen = inspect_model(model, exclude=["2"])
    assert {r.name: r.reason for r in seen.rows if not r.prunable} == {
        "0.weight": "Embedding is left alone unless it is named in types",
        "1.bias": VECTOR,
        "2.weight": "excluded by name",
        "2.bias": VECTOR,
        "3.weight": VECTOR,
        "3.bias": VECTOR,
    }
    assert seen.prunable == 16
    embedded = inspect_model(model, types=["Embedding"])
    assert [r.name for r in embedded.rows if r.prunable] == ["0.weight"]


def test_a_parametrised_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    rows = {r.name: r for r in inspect_model(model).rows}
    hidden = rows["0.parametrizations.weight.original1"]
    assert not hidden.prunable
    assert "remove_parametrizations" in hidden.reason


@pytest.mark.parametrize("pattern", [None, Channel()])
def test_masks_and_zeros_count_alike(pattern):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    kwargs = {} if pattern is None else {"pattern": pattern}
    masks = prune_(model, Method(target=Target("sparsity", 0.5), **kwargs)).masks
    inputs = (torch.zeros(3, 8),)
    by_mask = inspect_model(model, masks=masks, inputs=inputs)
    by_zero = inspect_model(model, inputs=inputs)
    assert by_mask.prunable_kept == by_zero.prunable_kept == 48
    assert by_mask.sparsity == by_zero.sparsity == 0.5
    assert by_mask.macs.density_weighted == by_zero.macs.density_weighted == 48 * 3
    assert by_mask.macs.dense == 96 * 3
    assert by_mask.kept == by_mask.params - sum(int((~m).sum()) for m in masks.values())
    assert by_mask.unmasked == {}


def test_masks_that_the_weights_do_not_obey():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    seen = inspect_model(model, masks={"weight": mask})
    assert seen.unmasked == {"weight": 3}
    assert seen.rows[0].kept == 5


def test_nothing_changes():
    model = Tied().train()
    before = copy.deepcopy(model.state_dict())
    inspect_model(model, inputs=(torch.zeros(1, 3, dtype=torch.int64),))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert model.attention.training


def test_refusals():
    with pytest.raises(WeightError, match="mask of shape"):
        inspect_model(nn.Linear(4, 2), masks={"weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(MetricsError):
        inspect_model(nn.Linear(4, 2), inputs=(torch.zeros(1, 3),))
    with pytest.raises(WeightError, match="nothing to prune"):
        inspect_model(nn.LayerNorm(4))
