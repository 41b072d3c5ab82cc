"""``secateur sensitivity``: the verb; the curves themselves are tested in tests/bench."""

from __future__ import annotations

import json

import pytest


def test_table_json_and_plot(call, workspace):
    shown = call("sensitivity", "recipe.toml", "--levels", "0.5,0.9", "--out", "curves")
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "12 of 60 samples of data.train (no\ndata.validation" in shown.out
    assert "at 0.9" in shown.out
    assert {p.name for p in (workspace / "curves").iterdir()} == {
        "sensitivity.json",
        "sensitivity.svg",
        "sensitivity.png",
    }
    written = json.loads((workspace / "curves" / "sensitivity.json").read_text())
    assert [layer["name"] for layer in written["layers"]] == ["0.weight", "4.weight"]
    assert [point["asked"] for point in written["layers"][0]["points"]] == [0.5, 0.9]


def test_json_is_all_there_is_on_standard_output(call, workspace):
    shown = call("sensitivity", "recipe.toml", "--levels", "0.5", "--json", "--out", "curves")
    assert shown.json() == json.loads((workspace / "curves" / "sensitivity.json").read_text())


def test_the_same_curves_give_the_same_plot(call, workspace):
    for folder in ("a", "b"):
        assert call("sensitivity", "recipe.toml", "--levels", "0.5", "--out", folder, "-q").code == 0
    for name in ("sensitivity.svg", "sensitivity.png", "sensitivity.json"):
        assert (workspace / "a" / name).read_bytes() == (workspace / "b" / name).read_bytes()


def test_without_matplotlib_everything_but_the_plot(call, workspace, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = call("sensitivity", "recipe.toml", "--levels", "0.5", "--out", "curves")
    assert shown.code == 0
    assert "no plot" in shown.err
    assert "secateur[plots]" in shown.err
    assert [p.name for p in (workspace / "curves").iterdir()] == ["sensitivity.json"]


@pytest.mark.parametrize(("factory", "on"), [("guarded", "data.train"), ("validated", "20 samples of data.validation")])
def test_the_test_split_is_never_read(call, workspace, factory, on):
    path = workspace / "recipe.toml"
    path.write_text(path.read_text().replace("net.py:data", f"net.py:{factory}") + 'score = "weight_gradient"\n')
    shown = call("sensitivity", path, "--levels", "0.5", "--repair-bn", "--json")
    assert shown.code == 0, shown.err
    assert on in shown.json()["evaluated_on"]


def test_a_recipe_that_trains_first_is_sent_for_a_run(call, finished, workspace):
    path = workspace / "recipe.toml"
    path.write_text(path.read_text().replace('weights = "dense.safetensors"', "") + "\n[train]\nepochs = 3\n")
    refused = call("sensitivity", path)
    assert refused.code == 2
    assert "--run DIR" in refused.err
    assert call("sensitivity", path, "--run", finished, "--levels", "0.5", "--json").code == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--levels", "0.5,x"], "--levels 0.5,x: expected numbers"),
        (["--levels", "1.5"], "in [0, 1], got 1.5"),
        (["--layers", "5"], "matches no prunable weight"),
        (["--metric", "acuracy"], "did you mean 'accuracy'?"),
        (["--run", "nowhere"], "no dense.safetensors"),
    ],
)
def test_refusals(call, workspace, argv, said):
    shown = call("sensitivity", "recipe.toml", *argv)
    assert (shown.code, shown.out) == (2, "")
    assert said in shown.err


def test_a_pattern_with_one_density_has_one_level(call, workspace):
    path = workspace / "recipe.toml"
    path.write_text(path.read_text().replace("target = { sparsity = 0.75 }", 'pattern = "nm"'))
    assert call("sensitivity", path, "--json").json()["levels"] == [0.5]
    refused = call("sensitivity", path, "--levels", "0.9")
    assert refused.code == 2
    assert "one density" in refused.err


def test_ctrl_c_is_exit_code_130(call, workspace):
    (workspace / "net.py").write_text(
        (workspace / "net.py").read_text() + "\n\ndef stop():\n    raise KeyboardInterrupt\n"
    )
    path = workspace / "recipe.toml"
    path.write_text(path.read_text().replace("net.py:data", "net.py:stop"))
    assert call("sensitivity", path).code == 130
