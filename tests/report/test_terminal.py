from __future__ import annotations

import io

import pytest
from rich.console import Console

from secateur.errors import DataError
from secateur.report import RunRecord, summary_table
from tests.report.fixture import masked_run, sliced_run, three_runs


def shown(runs: list[RunRecord], width: int = 80) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(summary_table(runs))
    return text.getvalue().splitlines()


@pytest.mark.parametrize("runs", [[masked_run()], three_runs()[:2], three_runs()])
def test_fits_in_80_columns_without_cutting_figures(runs: list[RunRecord]) -> None:
    lines = shown(runs)
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    for figure in ("97.8 % ± 0.5", "97.5 % ± 0.5", "0.9004", "asked 0.9", "2.41 ms", "[2.31–2.68]", "39.4 k", "9.93×"):
        assert figure in text


def test_a_mask_has_no_speed_up_and_says_why() -> None:
    text = " ".join(" ".join(shown([masked_run()])).split())
    assert "speed-up" not in text
    assert "nothing has been made faster yet" in text


def test_a_slice_has_one() -> None:
    text = " ".join(shown([sliced_run()]))
    assert "speed-up 1.93×" in text
    assert "faster" not in text


def test_mixed_runs_say_how_many_are_masked() -> None:
    assert "2 of 3 masked only" in " ".join(shown(three_runs()))


def test_every_row_says_its_kind() -> None:
    lines = [line.strip() for line in shown([masked_run()])]
    labels = sum(line.startswith(("counted", "measured", "modelled")) for line in lines)
    assert labels == 14


def test_names_are_not_markup() -> None:
    runs = three_runs()[:2]
    runs[0].result["name"] = "[red]x[/]"  # type: ignore[index]
    assert "[red]x[/]" in " ".join(shown(runs))


def test_no_runs_is_refused() -> None:
    with pytest.raises(DataError, match="at least one run"):
        summary_table([])
