from __future__ import annotations

import copy
import dataclasses
import re
import sys

import pytest

from secateur.errors import DataError
from secateur.report import RunRecord, render_report, write_report
from tests.report.fixture import LAYERS, deep_run, masked_run, three_runs
from tests.report.page import Node, parse

SPEED = re.compile(r"speed-?up|\bfaster\b(?! yet)|\bslower\b|\bquicker\b|the time\b", re.IGNORECASE)
SECTIONS = [
    "Over the run",
    "Sparsity per layer",
    "Weights before and after",
    "Exported files",
    "Notes",
    "How it was made",
]


@pytest.fixture(scope="module")
def three() -> str:
    return render_report(three_runs(), title="three ways")


@pytest.fixture(scope="module")
def one() -> str:
    return render_report([masked_run()])


def cells(page: Node, key: str) -> list[Node]:
    (row,) = page.all("tr", data_key=key)
    return row.all("td")


def changed(run: RunRecord, **fields: object) -> RunRecord:
    return dataclasses.replace(run, result={**copy.deepcopy(dict(run.result)), **fields})


def test_page_is_self_contained(three: str) -> None:
    page = parse(three)
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("iframe")
    assert "http:" not in three
    assert "https:" not in three
    assert "@import" not in three
    for node in page.walk():
        for name in ("src", "href", "xlink:href", "data", "action"):
            address = node.attrs.get(name)
            assert address is None or address.startswith("#") or address == "data:,", (node.tag, address)
        assert not any(name.startswith("on") for name in node.attrs)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]+)\)", three))


def test_every_section_of_every_run_is_there(three: str) -> None:
    page = parse(three)
    assert [h.text() for h in page.all("h1")] == ["three ways"]
    assert [h.text() for h in page.all("h2")][1:4] == [run.result["name"] for run in three_runs()]
    assert [h.text() for h in page.all("h3")] == SECTIONS * 3
    for section, run in zip(list(page.all("section", class_="run-section")), three_runs(), strict=True):
        assert section.all("pre")[0].text() == " ".join(str(run.result["recipe_text"]).split())
        assert "secateur run recipe.toml" in section.text()
        assert "Seed 7" in section.text()
        assert "2025-03-01 09:30:00 UTC" in section.text()
        assert "1 min 23 s" in section.text()


def test_ids_are_unique_and_references_lead_somewhere(three: str) -> None:
    ids = [node.attrs["id"] for node in parse(three).walk() if "id" in node.attrs]
    assert len(ids) == len(set(ids)) > 20
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', three)
    assert set(used) <= set(ids)


def test_tables_and_plots_are_accessible(three: str) -> None:
    page = parse(three)
    assert page.all("html", lang="en")
    for table in page.all("table"):
        assert len(table.all("caption")) == 1
        assert all(th.attrs.get("scope") in ("row", "col") for th in table.all("th"))
        widths = {sum(c.tag in ("th", "td") for c in row.children if isinstance(c, Node)) for row in table.all("tr")}
        assert len(widths) == 1
    drawings = page.all("svg")
    assert len(drawings) == 3 * (2 + 1 + len(LAYERS))
    labels = [svg.attrs["aria-label"] for svg in drawings if svg.attrs["role"] == "img"]
    assert len(labels) == len(drawings)
    assert labels[0] is not None
    assert labels[0].startswith("Accuracy over 14 epochs")
    assert "90% at epoch 12" in labels[0].replace("\u202f", "")


def test_a_mask_has_no_speed_up_anywhere(one: str) -> None:
    text = parse(one).text()
    assert not SPEED.search(text.replace("no promise of speed", "")), SPEED.search(text)
    assert "zeros held by a mask: nothing has been made faster yet" in text
    # The latencies themselves are measured, and shown; nothing is made of them.
    assert [c.text() for c in cells(parse(one), "latency")] == ["2.41 ms [2.31–2.68]"] * 2


def test_text_from_recipes_is_escaped() -> None:
    nasty = "<script>alert(1)</script>\"'&"
    run = changed(masked_run(), name=nasty, recipe_text=nasty, command=nasty, notes=[nasty])
    run.result["prune"]["layers"][0]["name"] = nasty
    run.result["histograms"] = {nasty: run.result["histograms"]["conv1.weight"]}
    run.result["profile"]["dense"]["macs"]["uncounted"] = {nasty: 1}
    run.result["exports"][0]["path"] = nasty
    page = render_report([run, run], title=nasty)
    assert "<script" not in page
    tree = parse(page)  # also: every element is closed in order
    assert tree.all("h1")[0].text() == nasty
    assert not tree.all("script")


def test_same_input_gives_the_same_page(one: str) -> None:
    assert render_report([masked_run()]) == one


def test_user_settings_of_matplotlib_do_not_show(one: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "axes.grid": True, "font.size": 30}):
        assert render_report([masked_run()]) == one
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_each_plot_has_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what the import system does for a missing package
    page = parse(render_report([masked_run()]))
    assert not page.all("svg")
    notices = [n.text() for n in page.all("p", class_="notice")]
    assert len(notices) == 2 + 1 + len(LAYERS)
    assert set(notices) == {"Plot not drawn: this needs the package 'matplotlib': pip install 'secateur[plots]'"}
    assert any("secateur[plots]" in note.text() for note in page.all("ul", class_="notes"))
    assert len(page.all("table")) == 3  # comparison, layers, exports: all still there


def test_many_layers_fold_and_the_smallest_histograms_are_left_out() -> None:
    page = parse(render_report([deep_run(53)]))
    (details,) = page.all("details")
    assert "Show all 53 layers" in details.text()
    assert len(details.all("tbody")[0].all("tr")) == 53
    (grid,) = page.all("div", class_="small-multiples")
    assert len(grid.all("figure")) == 24
    assert "29 smaller layers are not shown" in page.text()
    names = [figure.all("strong")[0].text().replace(" ", "") for figure in grid.all("figure")]
    assert names[0] == "features.denseblock4.denselayer5.conv2.weight"  # the last is the biggest


def test_write_report_writes_the_page(tmp_path, one: str) -> None:  # type: ignore[no-untyped-def]
    write_report([masked_run()], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == one
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_no_runs_is_refused() -> None:
    with pytest.raises(DataError, match="at least one run"):
        render_report([])
