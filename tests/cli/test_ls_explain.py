"""``secateur ls`` and ``secateur explain``."""

from __future__ import annotations

import pytest

from secateur.cli.axes import axes

PARTS = [(axis.name, name) for axis in axes().values() for name in axis.parts]


def test_ls_lists_every_part(call):
    shown = call("ls")
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 80
    for axis, name in PARTS:
        assert f"{axis}: " in shown.out
        assert f"  {name} " in shown.out
    listed = call("ls", "--json").json()
    assert [(axis, part["name"]) for axis, parts in listed.items() for part in parts] == PARTS
    assert all(part["summary"] for parts in listed.values() for part in parts)


def test_ls_one_axis(call):
    assert list(call("ls", "schedule", "--json").json()) == ["schedule"]
    wrong = call("ls", "schedul")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean 'schedule'?" in wrong.err


@pytest.mark.parametrize(("axis", "name"), PARTS)
def test_explain_every_part(call, axis, name):
    shown = call("explain", f"{axis}/{name}")
    assert shown.code == 0
    assert shown.out.startswith(f"{axis}: {name}\n")
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "\\" not in shown.out  # no LaTeX is left
    assert "``" not in shown.out
    card = call("explain", f"{axis}/{name}", "--json").json()
    assert (card["axis"], card["name"]) == (axis, name)
    for option in card["options"]:
        assert option["name"] in shown.out


def test_explain_says_what_a_person_needs(call):
    shown = call("explain", "cubic").out
    assert "s(t) = s_f + (s_0 - s_f) (1 - (t - t_0)/(n Δt))³" in shown
    assert "begin    number, required" in shown
    assert 'unit     "steps" | "epochs" | "rounds", default "steps"' in shown
    assert "Zhu" in shown
    assert "absolute gradient" in call("explain", "weight_gradient").out.split("Needs")[1]


def test_markdown_keeps_the_formula(call):
    shown = call("explain", "cubic", "--markdown").out
    assert "```math\ns(t) = s_f" in shown
    assert "| `end` | number | required | Time of the last update. |" in shown


def test_a_name_on_two_axes(call):
    wrong = call("explain", "linear")
    assert (wrong.code, wrong.out) == (2, "")
    assert "schedule/linear or learning-rate/linear" in wrong.err
    assert call("explain", "learning-rate/linear").code == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("magnitud", "did you mean 'magnitude'?"),
        ("score/magnitud", "did you mean 'magnitude'?"),
        ("scor/magnitude", "did you mean 'score'?"),
    ],
)
def test_an_unknown_name(call, name, said):
    wrong = call("explain", name)
    assert (wrong.code, wrong.out) == (2, "")
    assert said in wrong.err
