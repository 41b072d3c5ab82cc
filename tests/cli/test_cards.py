"""The committed method cards are those that the docstrings give, and their recipes are valid."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import secateur
from secateur.cli import cards
from secateur.cli.axes import axes
from secateur.cli.docstrings import to_markdown
from secateur.patterns import Channel, Layer
from secateur.recipe import from_dict

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
WANTED = cards.files()


def test_no_card_is_missing_or_left_over():
    assert {p.name for p in FOLDER.iterdir()} == set(WANTED), "run: make cards"


@pytest.mark.parametrize("name", WANTED)
def test_card_is_up_to_date(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == WANTED[name], "run: make cards"


@pytest.mark.parametrize("axis", ["score", "unit-score", "solver"])
def test_a_method_says_its_formula_its_needs_its_cost_and_its_source(axis):
    for name in axes()[axis].parts:
        text = cards.markdown(cards.card(axes()[axis], name))
        for part in ("```math", "## Cost", "## References"):
            assert part in text, (name, part)


@pytest.mark.parametrize("axis", ["score", "unit-score", "penalty", "parametrisation", "dynamics", "solver"])
def test_a_method_names_its_pitfalls(axis):
    for name in axes()[axis].parts:
        shown = cards.card(axes()[axis], name)
        assert len(shown.pitfalls) > 40, (name, "say under Pitfalls what it does not see, and where it goes wrong")
        assert f"\n## Pitfalls\n\n{to_markdown(shown.pitfalls)}\n" in cards.markdown(shown)
        assert ("heading", "Pitfalls") in list(cards.plain(shown))
        assert shown.to_dict()["pitfalls"] == shown.pitfalls
        body = " ".join(" ".join(block.split()) for block in shown.body)
        assert shown.pitfalls not in body, (name, "said twice")


def test_an_allocation_says_what_it_costs():
    for name in axes()["allocate"].parts:
        text = cards.markdown(cards.card(axes()["allocate"], name))
        assert "\n## Cost\n" in text, name
        assert "\n## References\n" in text, name


def test_links_of_the_index_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", WANTED["README.md"])
    assert len(links) == len(WANTED) - 1
    assert set(links) <= set(WANTED)


@pytest.mark.parametrize(
    ("axis", "name"),
    [(a, n) for a in axes().values() if a.field for n in a.parts],
    ids=lambda x: str(x)[:40],
)
def test_the_recipe_on_a_card_is_valid(axis, name):
    recipe = {
        "name": "card",
        "model": {"factory": "m:f"},
        "data": {"factory": "m:f"},
        "train": {"epochs": 100},
        "prune": {"target": {"sparsity": 0.5}},
    }
    if axis.name == "parametrisation":
        del recipe["prune"]
    shown = cards.card(axis, name)
    for key, value in tomllib.loads(shown.recipe).items():
        recipe[key] = {**recipe[key], **value} if isinstance(recipe.get(key), dict) else value
    if name == "cubic" or (axis.name == "schedule" and "steps" in shown.recipe):
        recipe["recover"] = {"retrain": {"name": "fine_tune", "epochs": 1}}
    built = from_dict(recipe)
    field = getattr(built, axis.table) if axis.table else built
    chosen = getattr(field, axis.field)
    assert getattr(chosen, "name", None) == name or chosen == name or getattr(chosen, name) is not None


@pytest.mark.parametrize(
    ("axis", "name"),
    [(a, n) for a in axes().values() if not a.field for n in a.parts],
    ids=lambda x: str(x)[:40],
)
def test_the_python_on_a_card_runs(axis, name):
    names = {
        "secateur": secateur,
        "Channel": Channel,
        "Layer": Layer,
        "target": secateur.Target("macs", 0.5),
    }
    exec(cards.card(axis, name).recipe, names)
    made = {
        "unit-score": lambda: names["method"].score,
        "unit-pattern": lambda: names["method"].pattern,
    }[axis.name]()
    required = {o.name: getattr(made, o.name) for o in cards.card(axis, name).options if o.required}
    assert made == axis.parts[name](**required)


def test_main_writes_the_folder_and_removes_stale_cards(tmp_path, capsys):
    (tmp_path / "score-gone.md").write_text("x")
    assert cards.main([str(tmp_path)]) == 0
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == WANTED
    assert cards.main([]) == 2
