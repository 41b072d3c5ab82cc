"""Energy against a counter that the measured call itself advances."""

import itertools
import time

import pytest
import torch

from secateur.errors import MetricsError
from secateur.metrics import measure_energy, modelled_joules
from secateur.metrics.energy import _delta, _measure, _Meter, _rapl, _watch

RANGE = 999_999


def zone(root, folder, name, energy_uj, top=RANGE):
    made = root / folder
    made.mkdir(parents=True)
    (made / "name").write_text(name + "\n")
    (made / "energy_uj").write_text(f"{energy_uj}\n")
    (made / "max_energy_range_uj").write_text(f"{top}\n")
    return made / "energy_uj"


def burn(counter, uj, top=RANGE):
    """Return a call that costs ``uj`` on the counter, wrapping it like the hardware does."""

    def call():
        counter.write_text(f"{(int(counter.read_text()) + uj) % (top + 1)}\n")
        time.sleep(0.001)

    return call


def measure(root, fn, seconds=0.1):
    return _measure(fn, _rapl(root), seconds, 0.01, torch.device("cpu"))


def test_a_known_counter_is_read_exactly(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    found = measure_energy(burn(counter, 250), root=tmp_path, seconds=1)
    assert found.joules == pytest.approx(250e-6, rel=1e-12)
    assert found.kind == "measured (RAPL)"
    assert found.calls > 1
    assert found.seconds >= 1
    assert (found.idle_watts, found.net_joules) == (0.0, found.joules)
    assert found.to_dict() == {"joules": found.joules, "kind": "measured (RAPL)"}


def test_twice_the_iterations_cost_twice_the_energy(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    once = burn(counter, 300)

    def twice():
        once()
        once()

    assert measure(tmp_path, twice).joules == pytest.approx(2 * measure(tmp_path, once).joules, rel=1e-12)


def test_a_counter_that_wraps_loses_nothing(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 40_000)
    found = measure(tmp_path, burn(counter, 7_001))  # wraps at the sixth call
    assert found.calls > 6
    assert found.joules == pytest.approx(7_001e-6, rel=1e-12)


def test_a_counter_may_wrap_between_any_two_readings():
    readings = itertools.count(0, 900_000)  # nine tenths of the range from each reading to the next
    taken = []

    def read():
        taken.append(next(readings))
        return (taken[-1] % (RANGE + 1),)

    total, _, calls = _watch(lambda: time.sleep(0.01), _Meter("", read, (RANGE + 1,)), 0.5, torch.device("cpu"))
    assert total == taken[-1] > RANGE
    assert calls >= 2


def test_wrap_arithmetic():
    assert _delta(10, 30, 100) == 20
    assert _delta(90, 10, 100) == 20
    assert _delta(99, 0, 100) == 1


def test_packages_and_memory_add_up_and_nothing_counts_twice(tmp_path):
    zones = [
        zone(tmp_path, "intel-rapl:0", "package-0", 0),
        zone(tmp_path, "intel-rapl:1", "package-1", 0),
        zone(tmp_path, "intel-rapl:0:2", "dram", 0),
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    (tmp_path / "intel-rapl").mkdir()

    def call():
        for i, counter in enumerate(zones):
            burn(counter, 10**i)()

    assert measure(tmp_path, call).joules == pytest.approx(111e-6, rel=1e-12)


class Clock:
    """A clock that only sleeping moves, so that a busy machine changes no figure."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_idle_power_is_taken_off_and_never_below_zero(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("secateur.metrics.energy.time", clock)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0, top=10**9)
    busy = burn(counter, 50, top=10**9)

    class Idle:
        """Advances the counter by 1 W while someone looks at it."""

        def __init__(self):
            self.last = clock.now

        def tick(self):
            now = clock.now
            counter.write_text(str(int(counter.read_text()) + int((now - self.last) * 1e6)))
            self.last = now

    idle = Idle()
    plain = _rapl(tmp_path)
    meter = _Meter("measured (RAPL)", lambda: (idle.tick(), plain.read())[1], plain.wraps)
    found = _measure(busy, meter, 0.3, 0.1, torch.device("cpu"))
    assert found.idle_watts == pytest.approx(1.0, rel=1e-4)
    assert found.joules > found.net_joules >= 0
    assert found.net_joules == pytest.approx(50e-6, rel=0.05)


def test_modelled_by_hand_and_labelled(tmp_path):
    assert modelled_joules(1000, 0) == pytest.approx(4.6e-9)
    assert modelled_joules(0, 8) == pytest.approx(1280e-12)
    ran = []
    found = measure_energy(lambda: ran.append(1), macs=1000, weight_bytes=8, root=tmp_path)
    assert found.joules == pytest.approx(4.6e-9 + 1.28e-9)
    assert found.kind == "modelled (Horowitz 2014, 45 nm)"
    assert "no RAPL counter" in found.note
    assert (found.calls, found.idle_watts, ran) == (0, None, [])


def test_without_meter_and_macs_there_is_no_figure(tmp_path):
    found = measure_energy(lambda: None, root=tmp_path / "gone")
    assert found.joules is None
    assert found.kind.startswith("not measured: no RAPL counter")


def test_a_counter_that_cannot_be_read_or_stands_still_is_not_a_measurement(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    still = measure_energy(lambda: None, macs=1, root=tmp_path)
    assert still.kind.startswith("modelled")
    assert "did not move" in still.note
    counter.write_text("what\n")
    broken = measure_energy(lambda: None, macs=1, root=tmp_path)
    assert broken.kind.startswith("modelled")
    assert "cannot be read" in broken.note


def test_short_measurements_are_refused():
    with pytest.raises(MetricsError, match="seconds >= 1"):
        measure_energy(lambda: None, seconds=0.5)
