"""``secateur inspect``: the table, its JSON, and bad references."""

from __future__ import annotations

import pytest


def test_table_fits_and_adds_up(call, workspace):
    shown = call("inspect", "net.py:make", "--input", "2,4,4,4")
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in shown.out
    assert all(line == line.rstrip() for line in lines)
    rows = {line.split()[0]: line.split() for line in lines[2:6]}
    # By hand: 3*3*4*8 weights at 16 positions of 2 samples; 128*3 weights on 2 samples; 8 + 8 + 3 in vectors.
    assert rows["0"] == ["0", "Conv2d", "8x4x3x3", "288", "41.7%", "yes", "9,216"]
    assert rows["4"] == ["4", "Linear", "3x128", "384", "55.6%", "yes", "768"]
    assert rows["3"] == ["3", "biases", "and", "norms", "19", "2.7%", "no", "0"]
    assert rows["total"] == ["total", "691", "100.0%", "9,984"]


def test_json_adds_up(call, workspace):
    seen = call("inspect", "net.py:make", "--input", "1,4,4,4", "--json").json()
    rows = seen["layers"]
    assert sum(row["params"] for row in rows) == seen["params"]["total"] == 691
    assert (
        sum(row["macs"] for row in rows) + seen["macs"]["without_a_weight"] == seen["macs"]["dense"] == 288 * 16 + 384
    )
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert [row["name"] for row in rows if row["prunable"]] == ["0.weight", "4.weight"]
    assert all(row["reason"] for row in rows if not row["prunable"])


def test_filters_and_reasons(call, workspace):
    shown = call("inspect", "net:make", "--exclude", "0")
    assert "Not pruned: 0.weight: excluded by name." in shown.out
    wrong = call("inspect", "net:make", "--exclude", "00")
    assert wrong.code == 2
    assert "'00' matches no prunable weight" in wrong.err


def test_recipe_brings_weights_and_filters(call, workspace):
    path = workspace / "recipe.toml"
    path.write_text(path.read_text() + 'exclude = ["4"]\n')
    seen = call("inspect", "recipe.toml", "--json").json()
    assert [row["name"] for row in seen["layers"] if row["prunable"]] == ["0.weight"]
    assert seen["source"] == "tiny"


def test_run_directory_is_counted_by_its_masks(call, finished):
    seen = call("inspect", finished, "--json").json()
    assert seen["params"]["kept_means"] == "by the masks"
    assert seen["params"]["prunable_kept"] == 672 // 4
    assert seen["unmasked"] == {}
    shown = call("inspect", finished)
    assert "sparsity 75.00% of what is prunable" in shown.out


def test_masks_that_were_not_applied_are_pointed_out(call, finished):
    shown = call("inspect", "net.py:make", "--masks", finished / "masks.safetensors")
    assert "are pruned by the mask and not zero" in shown.out


def test_zeros_are_counted_without_masks(call, finished):
    shown = call("inspect", "net.py:make", "--weights", finished / "model.safetensors", "--json").json()
    assert shown["params"]["kept_means"] == "not zero"
    assert shown["params"]["prunable_kept"] == 168


def test_columns_go_before_the_table_overflows(call, workspace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "45")
    shown = call("inspect", "net.py:make", "--input", "1,4,4,4")
    assert max(map(len, shown.out.splitlines())) <= 45
    assert "Left out to fit 45 columns: share" in shown.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["foo"], "expected package.module:factory"),
        (["..x:y"], "expected package.module:factory"),
        (["net.py:mak"], "did you mean 'make'?"),
        (["nett.py:make"], "no file nett.py"),
        (["nosuchmodule:make"], "no module 'nosuchmodule'"),
        (["net.py:needs"], "missing a required argument: 'size'"),
        (["net.py:wrong"], "expected a torch.nn.Module"),
        (["net.py:number"], "expected a function or class"),
        (["nope.toml"], "nope.toml: cannot be read"),
        (["."], "not finished: there is no model.safetensors in it"),
        ([".."], "holds no run: there is no recipe.toml in it"),
        (["net.py:make", "--input", "1,x"], "--input 1,x: expected whole numbers"),
        (["net.py:make", "--input", "1,0"], "--input 1,0: expected whole numbers"),
        (["net.py:make", "--input", "1,4:int63"], "did you mean 'int64'?"),
        (["net.py:make", "--input", "1,9,4,4"], "MACs"),
        (["net.py:make", "--weights", "no.safetensors"], "no.safetensors"),
        (["net.py:make", "--masks", "dense.safetensors"], "dense.safetensors"),
        (["net.py:make", "--types", "Linea"], "did you mean 'Linear'?"),
    ],
)
def test_bad_references(call, workspace, argv, said):
    shown = call("inspect", *argv)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("error: ")
    assert said in shown.err


def test_a_run_whose_network_is_elsewhere_needs_its_base(call, finished, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    refused = call("inspect", finished)
    assert refused.code == 2
    assert "--base" in refused.err
    assert call("inspect", finished, "--base", tmp_path).code == 0


def test_an_unfinished_run(call, finished):
    (finished / "model.safetensors").unlink()
    shown = call("inspect", finished)
    assert shown.code == 2
    assert "not finished" in shown.err
