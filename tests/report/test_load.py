from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.errors import CheckpointError
from secateur.report import RunRecord, load_run, render_report
from tests.report.fixture import masked_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = masked_run()
    (tmp_path / "result.json").write_text(json.dumps(run.result))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in run.events))
    return tmp_path


def test_a_run_comes_back_as_it_was_written(folder: Path) -> None:
    assert load_run(folder) == masked_run()


def shown_notes(run: RunRecord) -> str:
    made = {**run.result, "histograms": {}}
    return render_report([RunRecord(made, [], run.notes)])


def test_a_torn_last_line_is_left_out_and_noted(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in (1, 2, 40):
        path.write_bytes(whole[: -1 - cut])
        run = load_run(folder)
        assert list(run.events) == list(masked_run().events)[:-1]
        assert run.notes == ("the last line of metrics.jsonl (22) was cut short and is left out",)
        assert run.notes[0] in shown_notes(run)
    path.write_bytes(whole + '{"event": "é'.encode()[:-1])  # in the middle of a character
    assert list(load_run(folder).events) == list(masked_run().events)


def test_a_last_line_without_newline_is_whole(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert load_run(folder) == masked_run()


def test_a_damaged_line_in_the_middle_is_an_error(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{broken", *lines[3:]]))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 4 is not a JSON object"):
        load_run(folder)


def test_a_missing_log_is_noted(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    run = load_run(folder)
    assert run == RunRecord(masked_run().result, [], run.notes)
    assert "metrics.jsonl is missing" in run.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not valid JSON"),
        (b'{"schema": 1', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schema": 2}', "'schema' must be 1, got 2"),
        (b'{"schema": 1, "name": 3}', "'name' must be a str, got int"),
        (b'{"schema": 1, "name": "a"}', "'quality' must be a dict, got nothing"),
    ],
)
def test_an_invalid_result_names_the_file(folder: Path, content: bytes | None, message: str) -> None:
    path = folder / "result.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_run(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("realised", "dream", "'realised' must be one of mask, slice, sparse"),
        ("exports", [{"format": "onnx"}], "'exports' must be a list of objects with format, path, checked"),
        ("prune", {"layers": [{"name": "a"}]}, "'prune.layers' must be a list"),
        ("histograms", {"a": {"edges": [0, 1], "dense": [1, 2], "pruned": [1]}}, "'histograms'"),
        ("histograms", {"a": {"edges": [0, "x"], "dense": [1], "pruned": [1]}}, "'histograms'"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, field: str, value: object, message: str) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=message):
        load_run(folder)
