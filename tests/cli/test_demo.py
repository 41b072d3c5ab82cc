"""``secateur demo``: the folder that it may replace, and no other. What it computes is the pipeline's business."""

from __future__ import annotations


def test_a_folder_that_is_no_demo_is_left_alone(call, workspace):
    theirs = workspace / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    shown = call("demo", "--out", theirs)
    assert (shown.code, shown.out) == (2, "")
    assert "is not an earlier demo" in shown.err
    assert (theirs / "thesis.txt").read_text() == "years of work"
