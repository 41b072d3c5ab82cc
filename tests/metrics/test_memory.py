import pytest
import torch
from torch import nn

from secateur.metrics import measure_memory
from secateur.metrics.memory import weight_bytes


def test_weight_bytes_by_hand():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4, bias=False, dtype=torch.float64))
    assert weight_bytes(model) == 4 * (12 + 3) + 4 * (3 * 4) + 8 + 8 * 12  # the batch count is one int64


def test_shared_memory_counts_once_and_views_hold_all_of_theirs():
    whole = torch.zeros(100)
    model = nn.ParameterDict({"a": nn.Parameter(whole[:10]), "b": nn.Parameter(whole[50:])})
    assert weight_bytes(model) == 400
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 64
    with torch.device("meta"):
        assert weight_bytes(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))) == 2 * 440


class Hungry(nn.Module):
    def __init__(self, mib):
        super().__init__()
        self.mib = mib

    def forward(self, x):
        return torch.ones(self.mib, 1 << 18).sum() + x.sum()  # MiB of float32


def test_the_peak_is_measured_afresh_for_every_model():
    model, x = Hungry(1).train(), (torch.zeros(1),)
    low = measure_memory(model, x)
    if low.kind != "measured":
        pytest.skip(low.kind)
    high, again = measure_memory(Hungry(200), x), measure_memory(model, x)
    grown = high.peak_rss_bytes - low.peak_rss_bytes
    assert 150 << 20 < grown < 300 << 20
    assert again.peak_rss_bytes < high.peak_rss_bytes - (100 << 20)
    assert model.training
    assert set(low.to_dict()) == {"weight_bytes", "peak_rss_bytes", "kind"}


def test_where_it_cannot_be_measured_it_says_why(tmp_path):
    missing = measure_memory(nn.Linear(2, 2), (torch.zeros(1, 2),), proc=tmp_path / "gone")
    assert (missing.weight_bytes, missing.peak_rss_bytes) == (24, None)
    assert missing.kind.startswith("not measured: ")
    assert "No such file" in missing.kind
    (tmp_path / "status").write_text("VmHWM:\t  9000 kB\nVmRSS:\t  1000 kB\n")
    ignored = measure_memory(nn.Linear(2, 2), (torch.zeros(1, 2),), proc=tmp_path)
    assert ignored.peak_rss_bytes is None
    assert "did not reset" in ignored.kind
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert "VmHWM" in measure_memory(nn.Linear(2, 2), (torch.zeros(1, 2),), proc=tmp_path).kind
    (tmp_path / "status").write_text("VmHWM:\t  1010 kB\nVmRSS:\t  1000 kB\n")
    assert measure_memory(nn.Linear(2, 2), (torch.zeros(1, 2),), proc=tmp_path).peak_rss_bytes == 1010 * 1024
