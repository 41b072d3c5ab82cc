import dataclasses
import json

import pytest
import torch
from torch import nn

from secateur.errors import MetricsError
from secateur.metrics import Energy, Latency, MacCount, compare, measure_latency, profile

X = (torch.zeros(1, 1, 8, 8),)


def net(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 10))


@pytest.fixture(scope="module")
def masked():
    torch.manual_seed(0)
    model = net()
    keep = torch.zeros(10, 144, dtype=torch.bool)
    keep[:, :36] = True
    with torch.no_grad():
        model[3].weight *= keep
    return model, {"3.weight": keep}


def fast(latency, factor):
    return dataclasses.replace(latency, median_ms=latency.median_ms / factor)


LATENCY = Latency(10.0, 9.0, 11.0, 50, 10, 1, 1, "cpu", "float32")


def test_the_dict_has_the_agreed_shape_and_survives_json(masked, capfd):
    model, masks = masked
    latency = measure_latency({"m": model}, X, runs=2, warmup=0)["m"]
    found = profile(model, X, masks=masks, prunable=["0.weight", "3.weight"], latency=latency).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert capfd.readouterr() == ("", "")
    assert {k: set(v) for k, v in found.items() if k != "layers"} == {
        "params": {"total", "nonzero", "prunable", "prunable_kept"},
        "macs": {"dense", "density_weighted", "input", "uncounted"},
        "storage": {"size_bytes", "deflate_bytes", "modelled"},
        "latency": {"median_ms", "p10_ms", "p90_ms", "runs", "warmup", "threads", "batch", "device", "dtype"},
        "memory": {"weight_bytes", "peak_rss_bytes", "kind"},
        "energy": {"joules", "kind"},
    }
    assert found["params"]["prunable_kept"] == 36 + 360
    assert found["macs"]["dense"] == 36 * 36 + 1440
    assert found["macs"]["density_weighted"] == 36 * 36 + 360
    assert found["macs"]["input"] == "float32[1, 1, 8, 8]"
    assert found["memory"]["weight_bytes"] == 4 * (36 + 4 + 1440 + 10)
    fields = ("name", "shape", "params", "kept", "macs", "density_weighted_macs")
    assert found["layers"] == [
        dict(zip(fields, ("0.weight", [4, 1, 3, 3], 36, 36, 1296, 1296), strict=True)),
        dict(zip(fields, ("3.weight", [10, 144], 1440, 360, 1440, 360), strict=True)),
    ]


def test_layers_add_up_to_the_totals(masked):
    model, masks = masked
    found = profile(model, X, masks=masks, energy=False)
    assert isinstance(found.macs, MacCount)
    assert sum(r.macs for r in found.layers) + found.macs.unattributed == found.macs.dense
    assert sum(r.density_weighted_macs for r in found.layers) + found.macs.unattributed == found.macs.density_weighted
    assert found.energy is found.latency is None
    assert found.to_dict()["energy"] is None


class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum().item() >= 0 else x


def test_what_cannot_be_counted_says_why_and_the_rest_stands():
    found = profile(Peeks(), (torch.zeros(1, 4),), prunable=["fc.weight"])
    shown = found.to_dict()
    assert list(shown["macs"]) == ["not_measured"]
    assert "aten._local_scalar_dense" in shown["macs"]["not_measured"]
    assert shown["layers"][0]["macs"] is None
    assert shown["params"]["prunable"] == 16
    rows = {r.name: r for r in compare(found, found, realised="slice")}
    assert rows["macs (dense)"].kind == "not measured"
    assert rows["macs (dense)"].ratio is None


def test_user_errors_are_not_swallowed(masked):
    with pytest.raises(MetricsError, match=r"did you mean '3\.weight'"):
        profile(masked[0], X, masks={"3.weigth": masked[1]["3.weight"]})
    with pytest.raises(MetricsError, match="tuple"):
        profile(masked[0], X[0])


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_law_no_speedup_is_shown_for_a_mask_that_is_not_realised(masked, factor):
    """Promise 6: whatever the clock said, a masked dense model has no speed-up, in time or in energy."""
    model, masks = masked
    dense = profile(net(), X, latency=LATENCY)
    pruned = profile(model, X, masks=masks, latency=fast(LATENCY, factor))
    energy = Energy(1.0, "measured (RAPL)")
    dense = dataclasses.replace(dense, energy=energy)
    pruned = dataclasses.replace(pruned, energy=dataclasses.replace(energy, joules=1.0 / factor))
    rows = {r.name: r for r in compare(dense, pruned, realised="mask")}
    for name in ("latency", "energy"):
        assert rows[name].ratio is None
        assert "not realised" in rows[name].note
    for realised in ("slice", "sparse"):
        rows = {r.name: r for r in compare(dense, pruned, realised=realised)}
        assert rows["latency"].ratio == rows["energy"].ratio == pytest.approx(factor)
        assert rows["latency"].kind == "measured"


def test_the_masked_model_side_by_side(masked):
    model, masks = masked
    rows = {r.name: r for r in compare(profile(net(), X), profile(model, X, masks=masks), realised="mask")}
    assert list(rows) == [
        "parameters",
        "nonzero parameters",
        "compression_ratio",
        "macs (dense)",
        "macs (theoretical, density-weighted)",
        "storage",
        "storage deflated",
        "storage as CSR",
        "storage as bitmask",
        "latency",
        "weight memory",
        "peak memory",
        "energy",
    ]
    assert rows["parameters"].ratio == rows["macs (dense)"].ratio == rows["storage"].ratio == 1.0
    assert rows["compression_ratio"].pruned == pytest.approx(1490 / (1490 - 1080))
    assert rows["macs (theoretical, density-weighted)"].ratio == pytest.approx(2736 / 1656)
    assert rows["nonzero parameters"].pruned == 1490 - 1080
    assert rows["storage deflated"].ratio > 1.5
    assert rows["latency"].kind == "not measured"
    assert {r.kind for r in rows.values()} <= {"counted", "measured", "modelled", "not measured"}
    assert (rows["storage as CSR"].kind, rows["storage"].kind) == ("modelled", "counted")
    assert json.dumps([r.to_dict() for r in rows.values()])


def test_a_sliced_model_is_smaller_everywhere(masked):
    rows = {r.name: r for r in compare(profile(net(4), X), profile(net(1), X), realised="slice")}
    remaining = 9 + 1 + 360 + 10
    assert rows["parameters"].pruned == remaining
    assert rows["compression_ratio"].ratio == rows["weight memory"].ratio == 1490 / remaining
    assert rows["macs (dense)"].ratio == 4.0


def test_figures_of_different_kinds_or_inputs_get_no_ratio(masked):
    model, _ = masked
    one = dataclasses.replace(profile(model, X), energy=Energy(1.0, "measured (RAPL)"))
    two = dataclasses.replace(
        profile(model, (torch.zeros(2, 1, 8, 8),)), energy=Energy(2.0, "modelled (Horowitz 2014, 45 nm)")
    )
    rows = {r.name: r for r in compare(one, two, realised="slice")}
    assert rows["energy"].ratio is rows["macs (dense)"].ratio is None
    assert "modelled" in rows["energy"].note
    assert "float32[2, 1, 8, 8]" in rows["macs (dense)"].note
    with pytest.raises(MetricsError, match="'folded'"):
        compare(one, two, realised="folded")
