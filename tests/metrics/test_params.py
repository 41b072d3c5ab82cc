import pytest
import torch
from torch import nn

from secateur.errors import MetricsError
from secateur.metrics import count


def test_counts_by_hand():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[0, 0] = 0.0
        model[0].bias.zero_()
        model[2].weight.fill_(torch.nan)  # not a number is not zero
        model[2].bias.fill_(1e-38)
    keep = torch.tensor([[True, True, False, False]] * 3)
    found = count(model, {"0.weight": keep}, ["0.weight", "2.weight"])
    assert found.to_dict() == {"total": 23, "nonzero": 5 + 6 + 2, "prunable": 18, "prunable_kept": 6 + 6}
    assert found.remaining == 23 - 6
    assert found.sparsity == pytest.approx(1 / 3)
    assert [(r.name, r.params, r.nonzero, r.kept, r.prunable) for r in found.rows] == [
        ("0.weight", 12, 5, 6, True),
        ("0.bias", 3, 0, 3, False),
        ("2.weight", 6, 6, 6, True),
        ("2.bias", 2, 2, 2, False),
    ]


def test_masked_weights_are_prunable_and_nothing_else_is_unless_named():
    layer = nn.Linear(4, 3)
    assert count(layer).to_dict() == {"total": 15, "nonzero": 15, "prunable": 0, "prunable_kept": 0}
    assert count(layer).sparsity == 0.0
    gone = count(layer, {"weight": torch.zeros(3, 4, dtype=torch.bool)})
    assert (gone.prunable, gone.prunable_kept, gone.remaining, gone.nonzero) == (12, 0, 3, 3)


@pytest.mark.parametrize("rewrap", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_parameters_count_once(rewrap, device):
    from secateur.metrics.params import unique_parameters

    with torch.device(device):
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(4, 10, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data) if rewrap else model[0].weight
    first, names = unique_parameters(model)
    assert list(first) == ["0.weight", "2.weight"]
    assert names == {"0.weight": "0.weight", "1.weight": "0.weight", "2.weight": "2.weight"}
    if device == "cpu":
        found = count(model, prunable=["1.weight"])
        assert (found.total, found.prunable, found.rows[0].aliases) == (80, 40, ("1.weight",))


def test_overlapping_but_different_parameters_are_not_tied():
    whole = torch.randn(4, 4)
    model = nn.ParameterDict({"whole": nn.Parameter(whole), "part": nn.Parameter(whole[:2])})
    model["turned"] = nn.Parameter(whole.t())
    assert count(model).total == 16 + 8 + 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_every_dtype_counts(dtype):
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([[0.0, -0.0, 1.0, -2.0]]).to(dtype), requires_grad=False)})
    assert count(model).nonzero == 2
    assert count(model, {"w": torch.tensor([[True, True, True, False]])}).nonzero == 1


def test_refusals():
    layer = nn.Linear(4, 3)
    with pytest.raises(MetricsError, match="did you mean 'weight'"):
        count(layer, prunable=["weigh"])
    with pytest.raises(MetricsError, match="belongs to no tensor"):
        count(layer, {"other": torch.ones(3, 4, dtype=torch.bool)})
    with pytest.raises(MetricsError, match="meta"):
        count(nn.Linear(4, 3, device="meta"))
    with pytest.raises(MetricsError, match="lazy"):
        count(nn.LazyLinear(3))
