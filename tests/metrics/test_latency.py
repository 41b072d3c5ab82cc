import gc
import time

import pytest
import torch
from torch import nn

from secateur.errors import MetricsError
from secateur.metrics import Latency, measure_latency, speedup


def recorder(log, name, seconds=0.0):
    def call(x):
        log.append((name, torch.get_num_threads(), torch.is_inference_mode_enabled(), gc.isenabled()))
        time.sleep(seconds)
        return x

    return call


def test_calls_are_interleaved_and_take_turns():
    log, threads = [], torch.get_num_threads()
    found = measure_latency(
        {"a": recorder(log, "a"), "b": recorder(log, "b")}, (torch.zeros(7, 2),), runs=4, warmup=2, threads=1
    )
    assert "".join(name for name, *_ in log) == "abab" + "abbaabba"
    assert {tuple(rest) for _, *rest in log} == {(1, True, False)}
    assert gc.isenabled()
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()
    one = found["a"]
    assert (one.runs, one.warmup, one.threads, one.batch, one.device, one.dtype) == (4, 2, 1, 7, "cpu", "float32")
    assert list(one.to_dict())[:3] == ["median_ms", "p10_ms", "p90_ms"]


def test_a_known_duration_is_found():
    found = measure_latency(
        {"slow": recorder([], "", 0.02), "fast": recorder([], "", 0.005)}, (torch.zeros(1),), runs=9, warmup=1
    )
    slow, fast = found["slow"], found["fast"]
    assert 20 <= slow.p10_ms <= slow.median_ms <= slow.p90_ms
    assert slow.median_ms < 100
    assert 1.2 < speedup(slow, fast, realised="slice") < 5


def test_min_seconds_goes_on():
    log = []
    found = measure_latency({"a": recorder(log, "a", 0.01)}, (torch.zeros(1),), runs=1, warmup=0, min_seconds=0.1)
    assert 2 <= found["a"].runs == len(log) <= 10


def test_modules_run_in_eval_and_get_their_flags_back():
    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = nn.Dropout(), []

        def forward(self, x, *, scale):
            self.seen.append((self.training, self.inner.training))
            return self.inner(x) * scale

    model = Watch().train()
    model.inner.eval()
    found = measure_latency({"m": model}, (torch.zeros(3, dtype=torch.int64),), {"scale": 2}, runs=2, warmup=1)
    assert model.seen == [(False, False)] * 3
    assert (model.training, model.inner.training) == (True, False)
    assert found["m"].dtype == "int64"

    def fails(x, *, scale):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_latency({"m": model, "bad": fails}, (torch.zeros(3),), {"scale": 2}, threads=1)
    assert model.training
    assert gc.isenabled()


def test_no_speedup_for_a_mask_that_is_not_realised():
    dense = Latency(10.0, 9.0, 11.0, 50, 10, 1, 1, "cpu", "float32")
    other = Latency(5.0, 4.0, 6.0, 50, 10, 1, 1, "cpu", "float32")
    assert speedup(dense, other, realised="mask") is None
    assert speedup(dense, other, realised="slice") == speedup(dense, other, realised="sparse") == 2.0
    with pytest.raises(MetricsError, match="'shrunk'"):
        speedup(dense, other, realised="shrunk")
    with pytest.raises(MetricsError, match="cannot be compared"):
        speedup(dense, Latency(5.0, 4.0, 6.0, 50, 10, 2, 1, "cpu", "float32"), realised="slice")


@pytest.mark.parametrize("bad", [{"runs": 0}, {"warmup": -1}, {"threads": 0}])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(MetricsError, match="latency needs"):
        measure_latency({"a": torch.relu}, (torch.zeros(1),), **bad)
    with pytest.raises(MetricsError, match="0 models"):
        measure_latency({}, (torch.zeros(1),))
    with pytest.raises(MetricsError, match="tuple"):
        measure_latency({"a": torch.relu}, torch.zeros(1))
