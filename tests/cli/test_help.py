"""``--help`` answers at once, names every option, and fits 80 columns."""

from __future__ import annotations

import pytest
import typer.main

from secateur import __version__
from secateur.cli import app

VERBS = dict(typer.main.get_command(app).commands)


def test_the_verbs_are_those_of_the_design():
    assert {"run", "demo", "inspect", "sensitivity", "export", "ls", "explain"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option_in_80_columns(call, verb):
    shown = call(verb, "--help")
    assert shown.code == 0
    for parameter in VERBS[verb].params:
        names = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name]
        for name in names:
            assert f" {name} " in shown.out, name
    assert max(len(line) for line in shown.out.splitlines()) <= 80
    assert len(shown.out.splitlines()) < 60


@pytest.mark.parametrize("verb", ["inspect", "sensitivity", "export", "ls", "explain"])
def test_help_has_an_example_and_json(call, verb):
    shown = call(verb, "--help").out
    assert f"secateur {verb}" in shown.split("For example:")[1]
    assert "--json" in shown


def test_no_argument_shows_help(call):
    assert "Commands" in call().out


def test_version(call):
    shown = call("--version")
    assert (shown.code, shown.out.strip()) == (0, __version__)


def test_help_does_not_load_torch(python):
    code = f"""
import sys
from secateur.cli import main
assert main(["--help"]) == 0
for verb in {list(VERBS)}:
    assert main([verb, "--help"]) == 0
heavy = {{"torch", "numpy", "matplotlib", "onnx", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code)
    assert done.code == 0, done.err


@pytest.mark.parametrize("argv", [["no-such-verb"], ["inspect"], ["explain"], ["ls", "--no-such-option"]])
def test_wrong_usage_is_exit_code_2(call, argv):
    assert call(*argv).code == 2
