from __future__ import annotations

from typing import Any

import pytest

from secateur.report import RunRecord, render_report
from secateur.report.plots import Course, Line, course_plot, histogram_plot, layer_plot
from secateur.report.view import courses, engine_rows, story
from tests.report.fixture import masked_run, sliced_run
from tests.report.page import parse


def epoch(number: int, step: int | None = None, **fields: Any) -> dict[str, Any]:
    return {"event": "epoch", "epoch": number, "step": step, "loss": 1.0, "metrics": {"accuracy": 0.5}} | fields


def prune(at: int, step: int | None, sparsity: float) -> dict[str, Any]:
    return {"event": "prune", "epoch": at, "step": step, "sparsity": sparsity}


def course(*events: dict[str, Any]) -> Course:
    return courses(RunRecord(masked_run().result, events))[0]


def test_pruning_between_epochs_is_placed_by_its_step() -> None:
    made = course(prune(0, 0, 0.1), epoch(1, 100), prune(1, 125, 0.2), epoch(2, 200), prune(2, 200, 0.3))
    assert made.prunings == [(0.0, 0.1), (1.25, 0.2), (2.0, 0.3)]


def test_pruning_without_steps_is_placed_by_its_epoch() -> None:
    assert course(epoch(1), prune(1, None, 0.2), epoch(2)).prunings == [(1.0, 0.2)]


def test_epochs_counted_from_zero_are_shown_as_epochs_done() -> None:
    made = course(epoch(0, 10), prune(0, 10, 0.2), epoch(1, 20))
    assert made.lines[0].x == [1.0, 2.0]
    assert made.prunings == [(1.0, 0.2)]


def test_an_epoch_logged_twice_counts_once() -> None:
    made = course(epoch(1, 10), epoch(2, 20), epoch(2, 20, metrics={"accuracy": 0.75}))
    assert made.lines[0].y == [0.5, 0.75]


def test_loss_shows_evaluation_and_training() -> None:
    accuracy, loss = courses(masked_run())
    assert (accuracy.name, loss.name) == ("accuracy", "loss")
    assert [line.dashed for line in loss.lines] == [False, True]
    assert accuracy.reference == 0.978
    assert loss.reference == 0.0712
    assert [round(s, 2) for _, s in accuracy.prunings] == [0.44, 0.68, 0.82, 0.9]


def test_story_tells_what_happened() -> None:
    text = " ".join(story(sliced_run())).replace("\u202f", " ")
    assert text == (
        "Of 390 k prunable weights in 5 layers, 195 k were kept. Whole channels (filters and neurons) are removed. "
        "It was fine-tuned for 6 epochs after pruning. Quality was measured on 1 000 examples."
    )


def test_plots_carry_labels_lines_and_page_colours() -> None:
    svg = course_plot(Course("accuracy", [Line([1, 2], [0.5, 0.9])], [(1, 0.5), (1.9, 0.9)], 2, True), "x")
    words = [t.children[0] for t in parse(svg).all("text")]
    assert {"50\u202f%", "90\u202f%", "epoch"} <= set(words)
    assert "var(--accent)" in svg
    assert "var(--sans)" in svg
    assert "#" not in svg.replace("#x-", "")


def test_many_prunings_label_the_last_and_do_not_crowd() -> None:
    steps = [(1 + i / 10, i / 100) for i in range(91)]
    svg = course_plot(Course("loss", [Line([1, 10], [1.0, 0.5])], steps, 10), "x")
    labels = [t for t in parse(svg).all("text") if str(t.children[0]).endswith("\u202f%")]
    assert "90\u202f%" in [t.children[0] for t in labels]
    assert len(labels) <= 10 + 3  # at most every 11 % of the width, and three ticks


@pytest.mark.parametrize("name", ["a$b$", "x" * 300, "<b>&", "層.weight"])
def test_odd_layer_names_are_drawn_as_they_are(name: str) -> None:
    svg = layer_plot([name], [0.5], 0.5, name, "x")
    assert parse(svg).all("svg")[0].attrs["aria-label"] == name


def test_histogram_draws_single_weights_above_the_floor() -> None:
    svg = histogram_plot([-1.0, 0.0, 1.0], [1, 0], [0, 0], "one weight", "x")
    assert "NaN" not in svg
    assert "inf" not in svg.lower().replace("infinity", "")
    assert "1" in [t.children[0] for t in parse(svg).all("text")]


def engine(name: str, network: str, ms: float) -> dict[str, Any]:
    return {"engine": name, "network": network, "median_ms": ms, "p10_ms": ms, "p90_ms": ms, "threads": 1}


def test_engines_are_compared_with_dense_pytorch() -> None:
    run = masked_run()
    run.result["engines"] = [  # type: ignore[index]
        engine("PyTorch", "dense", 4.0),
        engine("secateur", "pruned, sparse kernels", 1.0),
        engine("ONNX Runtime", "pruned", 8.0),
    ]
    rows = engine_rows(run)
    assert [(row.engine, row.change) for row in rows] == [
        ("PyTorch", ""),
        ("secateur", "4.00 times as fast"),
        ("ONNX Runtime", "0.500 times as fast"),
    ]
    page = render_report([run])
    assert "sparse kernels" in page
    assert "<b>x</b>" not in page
    run.result["engines"][0]["engine"] = "<b>x</b>"  # type: ignore[index]
    assert "<b>x</b>" not in render_report([run])


def test_a_run_without_engines_has_no_section() -> None:
    assert engine_rows(masked_run()) == []
    assert "Engines" not in render_report([masked_run()])
