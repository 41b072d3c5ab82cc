from __future__ import annotations

import re
import sys

import pytest

from secateur.report import RunRecord, render_report
from tests.report.fixture import BIASES, LAYERS, N, deep_run, masked_run, numel, sliced_run, three_runs
from tests.report.page import Node, parse

SPEED = re.compile(r"speed-?up|\bfaster\b(?! yet)|\bslower\b|\bquicker\b|the time\b", re.IGNORECASE)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests read tables and sentences; drawing for each of them would take most of their time."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)


@pytest.fixture
def one() -> str:
    return render_report([masked_run()])


@pytest.fixture
def three() -> str:
    return render_report(three_runs())


def cells(page: Node, key: str) -> list[Node]:
    (row,) = page.all("tr", data_key=key)
    return row.all("td")


def test_lead_is_one_plain_sentence(one: str) -> None:
    (sentence,) = parse(one).all("p", class_="sentence")
    assert sentence.text() == (
        "90 % of the weights removed by iterative global magnitude; accuracy 97.8 % → 97.5 % (−0.30 points); "
        "asked 0.9, achieved 0.9004."
    )


def test_a_slower_mask_has_no_speed_up_either() -> None:
    run = masked_run()
    run.result["profile"]["pruned"]["latency"]["median_ms"] = 0.5
    run.result["profile"]["pruned"]["energy"]["joules"] = 1e-4
    page = parse(render_report([run]))
    assert not SPEED.search(page.text().replace("no promise of speed", ""))
    assert cells(page, "latency")[1].text() == "0.500 ms [2.31–2.68]"
    assert cells(page, "energy")[1].text() == "100 µJ"


def test_a_slice_shows_the_measured_speed_up(three: str) -> None:
    text = parse(render_report([sliced_run()])).text()
    assert "speed-up 1.93×" in text
    assert "nothing has been made faster yet" not in text
    latency = [c.text() for c in cells(parse(three), "latency")]
    assert latency[1] == latency[0]
    assert "speed-up" not in latency[2]
    assert latency[3] == "1.25 ms [1.20–1.39] speed-up 1.93×"


def test_a_slice_that_is_slower_says_so() -> None:
    run = sliced_run()
    run.result["profile"]["pruned"]["latency"] |= {"median_ms": 4.82}
    assert cells(parse(render_report([run])), "latency")[1].text().endswith("slower: 2.00× the time")


def test_latencies_under_other_conditions_are_not_compared() -> None:
    run = sliced_run()
    run.result["profile"]["pruned"]["latency"] |= {"threads": 2}
    text = [c.text() for c in cells(parse(render_report([run])), "latency")]
    assert "speed-up" not in "".join(text)
    assert "other conditions" in text[1]
    assert "2 threads" in text[1]


def test_energies_of_different_kinds_are_not_compared() -> None:
    run = sliced_run()
    run.result["profile"]["pruned"]["energy"] = {"joules": 1e-3, "kind": "measured (RAPL)"}
    page = parse(render_report([run]))
    (row,) = page.all("tr", data_key="energy")
    assert "% of dense" not in row.text()
    assert "measured (RAPL)" in row.text()
    assert "modelled (Horowitz" in row.text()
    assert [tag.text() for tag in row.all("span") if "tag" in (tag.attrs.get("class") or "").split()] == [
        "measured",
        "modelled",
    ]


def test_every_row_is_tagged(three: str) -> None:
    (table,) = parse(three).all("table", class_="compare")
    rows = [row for row in table.all("tr") if "data-key" in row.attrs]
    tags = {
        row.attrs["data-key"]: [s.text() for s in row.all("span") if (s.attrs.get("class") or "").startswith("tag")]
        for row in rows
    }
    assert tags == {
        "quality_accuracy": ["measured"],
        "quality_loss": ["measured"],
        "target": ["counted"],
        "params": ["counted"],
        "nonzero": ["counted"],
        "compression": ["counted"],
        "macs": ["counted"],
        "macs_weighted": ["counted"],
        "size": ["counted"],
        "deflate": ["measured"],
        "csr": ["modelled"],
        "bitmask": ["modelled"],
        "latency": ["measured"],
        "weight_memory": ["counted"],
        "peak_memory": ["measured"],
        "energy": ["modelled"],
    }
    (theoretical,) = table.all("tr", data_key="macs_weighted")
    assert "theoretical" in theoretical.text()


def test_figures_of_the_comparison(one: str) -> None:
    page = parse(one)
    kept = 700 + 4_600 + 11_000 + 21_600 + 1_000
    total = sum(numel(name) for name in LAYERS)
    accuracy, pruned = cells(page, "quality_accuracy")
    assert accuracy.attrs["title"] == "0.978"
    assert pruned.text() == "97.5 % ± 0.5 −0.30 points"
    assert f"n = {N // 1000} 000 examples" in page.all("tr", data_key="quality_accuracy")[0].text()
    assert [c.attrs.get("title") for c in cells(page, "nonzero")] == [str(total + BIASES), str(kept + BIASES)]
    assert cells(page, "params")[1].text() == "391 k as dense"
    ratio = (total + BIASES) / (kept + BIASES)
    assert cells(page, "compression")[1].text() == f"{ratio:.2f}× 39.4 k of 391 k remain"
    assert cells(page, "target")[1].text() == "0.9004 asked 0.9"
    assert cells(page, "size")[0].text() == "1.49 MiB"
    assert cells(page, "peak_memory")[1].text() == "not measured the kernel did not reset VmHWM"


def test_totals_are_the_sums_of_the_rows(three: str) -> None:
    page = parse(three)
    for table in page.all("table", class_="layers"):
        (body,) = table.all("tbody")
        (foot,) = [row for row in table.all("tfoot")[0].all("tr") if "All listed" in row.text()]
        for column in (1, 2, 4, 5):  # weights, kept, dense MACs, theoretical MACs
            exact = [float(row.all("td")[column].attrs["title"] or "") for row in body.all("tr")]
            assert float(foot.all("td")[column].attrs["title"] or "") == sum(exact)
        weights, kept = (float(foot.all("td")[i].attrs["title"] or "") for i in (1, 2))
        assert float(foot.all("td")[3].attrs["title"] or "") == pytest.approx(1 - kept / weights)
    # Every parameter is accounted for: the rows and the sentence below them.
    assert f"other {BIASES} parameters" in page.text()


def test_layers_left_alone_say_why_and_the_totals_keep_them_apart() -> None:
    run = masked_run()
    run.result["prune"]["layers"].pop(0)
    run.result["prune"]["skipped"] = {"conv1.weight": "excluded by name"}
    (table,) = parse(render_report([run])).all("table", class_="layers")
    assert "left alone: excluded by name" in table.all("tbody")[0].all("tr")[0].text()
    assert [row.all("th")[0].text() for row in table.all("tfoot")[0].all("tr")] == [
        "Pruned layers",
        "All listed layers",
    ]


def test_a_profile_that_names_modules_joins_the_weights() -> None:
    run = masked_run()
    for which in ("dense", "pruned"):
        for row in run.result["profile"][which]["layers"]:
            row["name"] = row["name"].removesuffix(".weight")
    (table,) = parse(render_report([run])).all("table", class_="layers")
    assert len(table.all("tbody")[0].all("tr")) == len(LAYERS)
    assert "not counted" not in table.text()


def test_forty_layers_stay_open() -> None:
    page = parse(render_report([deep_run(40)]))
    assert not page.all("details")
    assert "not shown" in page.text()


def test_runs_of_different_networks_get_tables_of_their_own() -> None:
    other = sliced_run()
    other.result["quality"]["dense"]["accuracy"] = 0.5
    page = parse(render_report([masked_run(), other]))
    tables = page.all("table", class_="compare")
    assert [len(table.all("thead")[0].all("th")) for table in tables] == [3, 3]
    assert "half of the filters" in tables[1].all("caption")[0].text()


def test_a_dense_figure_measured_for_each_run_stands_beside_it() -> None:
    runs = three_runs()
    runs[2].result["profile"]["dense"]["latency"]["median_ms"] = 2.5
    page = parse(render_report(runs))
    assert [c.text() for c in cells(page, "latency")] == [
        "measured for each run",
        "2.41 ms [2.31–2.68] dense 2.41 ms [2.31–2.68]",
        "not measured dense 2.41 ms [2.31–2.68] not asked for",
        "1.25 ms [1.20–1.39] speed-up 2.00× dense 2.50 ms [2.31–2.68]",
    ]


def test_what_was_not_measured_says_why() -> None:
    run = masked_run()
    del run.result["quality"]["dense"]
    for which in ("dense", "pruned"):
        run.result["profile"][which] |= {
            "macs": {"not_measured": "no forward on meta"},
            "latency": None,
            "energy": None,
        }
    page = parse(render_report([RunRecord(run.result, [])]))
    assert cells(page, "quality_accuracy")[0].text() == "not measured there was no dense network in this run"
    assert cells(page, "macs")[1].text() == "not measured no forward on meta"
    assert cells(page, "energy")[1].text() == "not measured not asked for"
    assert "accuracy not measured → 97.5 %;" in page.text()
    assert "No epochs were recorded" in page.text()


def test_bare_result_still_makes_a_page() -> None:
    bare = {"name": "bare", "quality": {}, "prune": {}, "profile": {}, "realised": "mask"}
    page = parse(render_report([RunRecord(bare, [])]))
    assert len(page.all("h3")) == 6


def test_other_targets_show_the_sparsity_besides() -> None:
    run = masked_run()
    run.result["prune"] |= {"target": "macs", "asked": 0.25, "achieved": 0.2449}
    page = parse(render_report([run]))
    assert cells(page, "target")[1].text() == "0.2449 asked 0.25 (macs)"
    assert cells(page, "sparsity")[1].text() == "0.9004"
    assert "asked 0.25, achieved 0.2449 (macs)" in page.text()


def test_not_finite_figures_are_named() -> None:
    run = masked_run()
    run.result["quality"]["pruned"] |= {"loss": float("nan")}
    run.events[-1]["loss"] = float("inf")  # type: ignore[index]
    assert cells(parse(render_report([run])), "quality_loss")[1].text() == "not finite"


def test_regression_has_no_percentages() -> None:
    run = masked_run()
    run.result["higher_is_better"] = {"mean_absolute_error": False, "loss": False}
    run.result["quality"] = {
        "dense": {"loss": 3000.0, "mean_absolute_error": 41.5, "n": 89},
        "pruned": {"loss": 3100.0, "mean_absolute_error": 43.0, "n": 89},
    }
    page = parse(render_report([run]))
    assert cells(page, "quality_mean_absolute_error")[1].text() == "43.00 +1.50"
    assert "mean absolute error 41.50 → 43.00 (+1.50)" in page.text()
