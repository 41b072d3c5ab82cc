"""``secateur run``: what it refuses before any of the user's code runs, and that it runs."""

from __future__ import annotations

import json

import pytest


def test_check_prints_the_whole_recipe_and_runs_nothing(call, workspace):
    (workspace / "net.py").write_text("raise AssertionError('imported')")
    shown = call("run", workspace / "recipe.toml", "--check")
    assert shown.code == 0
    assert "sparsity = 0.75" in shown.out
    assert "batch_norm_samples" in shown.out  # a default
    assert not (workspace / "runs").exists()


def test_check_as_json(call, workspace):
    assert call("run", workspace / "recipe.toml", "--check", "--json").json()["prune"]["target"] == {"sparsity": 0.75}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sparsity = 0.75", "sparsity = 1.5", ["prune.target", "1.5", "[0, 1]"]),
        ("[prune]", '[prune]\nscore = "magnitud"', ["prune.score", "'magnitud'", "did you mean 'magnitude'?"]),
        ("batch_size", "batchsize", ["data.batchsize", "did you mean 'batch_size'?"]),
        ("batch_size = 20", "batch_size = 'x'", ["data.batch_size", "'x'", "integer"]),
        ('name = "tiny"', "", ["name", "is missing"]),
    ],
)
def test_a_bad_recipe_is_one_message_with_file_field_value_and_way_out(call, workspace, old, new, said):
    path = workspace / "recipe.toml"
    path.write_text(path.read_text().replace(old, new))
    shown = call("run", path, "--check")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    for part in [str(path), *said]:
        assert part in shown.err


def test_a_missing_recipe(call, workspace):
    shown = call("run", "nope.toml")
    assert shown.code == 2
    assert "nope.toml" in shown.err


def test_a_run_can_be_inspected_and_exported(call, workspace):
    path = workspace / "recipe.toml"
    path.write_text(path.read_text() + "\n[measure]\nlatency = false\nenergy = false\n")
    done = call("run", path, "--out", "first", "--json")
    assert done.code == 0, done.err
    assert done.json()["prune"]["achieved"] == pytest.approx(0.75, abs=1e-3)
    seen = call("inspect", "first", "--json").json()
    rows = {row["name"]: row["kept"] for row in done.json()["prune"]["layers"]}
    assert {row["name"]: row["kept"] for row in seen["layers"] if row["prunable"]} == rows
    written = call("export", "first", "--out", "again", "--json").json()
    assert [item["format"] for item in written] == ["safetensors"]
    assert (workspace / "again" / "model.safetensors").read_bytes() == (
        workspace / "first" / "exports" / "model.safetensors"
    ).read_bytes()


def test_the_result_is_json_and_nothing_else(call, workspace):
    path = workspace / "recipe.toml"
    path.write_text(path.read_text() + "\n[measure]\nlatency = false\nenergy = false\n")
    shown = call("run", path, "--json")
    assert json.loads(shown.out)["name"] == "tiny"
    assert (workspace / "runs" / "tiny" / "result.json").exists()
