"""Recipes: exact round trips, and one message with path, value and nearest name for whatever is wrong."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.recipe import Recipe, from_dict, load

GOOD: dict[str, Any] = {
    "name": "full",
    "seed": 7,
    "threads": 2,
    "export": ["safetensors", "onnx"],
    "model": {
        "factory": "models.py:net",
        "args": {"width": 3, "deep": {"list": [1, 2.5, "x", True]}},
        "weights": "w.pt",
    },
    "data": {"factory": "pkg.mod:make", "batch_size": 16},
    "train": {
        "epochs": 6,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "lr_schedule": {"name": "steps", "milestones": [2, 4.5]},
    },
    "prune": {
        "target": {"compression_ratio": 12.5},
        "score": {"name": "weight_gradient", "sign": "signed"},
        "pattern": {"name": "block", "rows": 4, "cols": 1, "reduce_by": "l2"},
        "allocate": {"name": "layerwise"},
        "schedule": {"name": "iterative", "rounds": 3},
        "include": ["conv*", "fc?"],
        "exclude": ["fc3"],
        "types": ["Conv2d", "Linear"],
        "overrides": [{"match": "fc2", "sparsity": 0.25}],
    },
    "recover": {"retrain": {"name": "weight_rewinding", "epochs": 4}, "batch_norm": "reestimate"},
    "measure": {"latency": False},
    "checkpoint": {"every_steps": 10},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the good recipe with one field replaced, or removed when the value is ``...``."""
    values = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    table = values
    for parent in parents:
        table = table[parent]
    if value is ...:
        del table[last]
    else:
        table[last] = value
    return values


def write(recipe: Recipe, path: Path) -> Path:
    if path.suffix == ".toml":
        path.write_text(recipe.to_toml())
    elif path.suffix == ".json":
        path.write_text(json.dumps(recipe.to_dict()))
    else:
        path.write_text(yaml.safe_dump(recipe.to_dict()))
    return path


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".yml", ".json"])
def test_round_trip_is_exact(suffix: str, tmp_path: Path) -> None:
    recipe = from_dict(GOOD)
    assert load(write(recipe, tmp_path / f"r{suffix}")) == recipe
    again = load(write(load(tmp_path / f"r{suffix}"), tmp_path / f"again{suffix}"))
    assert again == recipe
    assert again.prune.build() == recipe.prune.build()


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "sparsity": st.floats(0, 1),
            "compression_ratio": st.floats(1, 1e6),
            "macs": st.floats(0, 1),
        },
    ).filter(lambda d: len(d) == 1),
    st.floats(1e-12, 1e6),
    st.integers(0, 2**63 - 1),
)
def test_every_number_survives_toml(target: dict[str, float], lr: float, seed: int) -> None:
    values = changed("prune.target", target) | {"seed": seed}
    values["train"]["optimizer"]["lr"] = lr
    recipe = from_dict(values)
    assert from_dict(tomllib.loads(recipe.to_toml())) == recipe
    assert from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


WRONG = [
    ("prune.scor", "magnitude", "prune.scor: unknown field; did you mean 'score'?"),
    ("prune.score", "magnitud", "prune.score: unknown score 'magnitud'; did you mean 'magnitude'?"),
    ("prune.score", {"name": "magnitude", "p": 3}, "prune.score.p: got 3"),
    ("prune.score", {"name": "magnitude", "p": "1"}, "prune.score.p: got '1'"),
    ("prune.score", {"name": "magnitude", "q": 1}, "prune.score.q: 'magnitude' has no such option"),
    ("prune.score", {"p": 1}, "prune.score"),
    ("prune.score", "random", "'random' needs seed"),
    ("prune.score", {"name": "random", "seed": 1.5}, "prune.score.seed: got 1.5"),
    ("prune.pattern", {"name": "block", "rows": 0}, "both sides must be at least 1"),
    ("prune.pattern", {"name": "block", "reduce_by": "median"}, "prune.pattern.reduce_by: got 'median'"),
    ("prune.pattern", {"name": "nm", "n": 5, "m": 4}, "5:4 is not a pattern"),
    ("prune.allocate", "globl", "did you mean 'global'?"),
    ("prune.schedule", {"name": "iterative"}, "'iterative' needs rounds"),
    (
        "prune.schedule",
        {"name": "iterative", "rounds": 0},
        "the number of updates must be a whole number of at least 1, got 0",
    ),
    ("prune.schedule", {"name": "cubic", "begin": 0, "end": 10, "every": 3}, "does not divide"),
    ("prune.when", "now", "prune.when: got 'now'"),
    ("prune.when", "during", "'rounds' exclude each other"),
    ("prune.target", {"sparsity": 1.5}, "sparsity must lie in [0, 1], got 1.5"),
    ("prune.target", {"sparsity": float("nan")}, "sparsity"),
    ("prune.target", {"sparsity": True}, "prune.target.sparsity: got True"),
    ("prune.target", {"sparsity": 0.5, "macs": 0.5}, "give exactly one"),
    ("prune.target", {}, "give exactly one"),
    ("prune.target", ..., "prune.target is missing"),
    (
        "prune.overrides",
        [{"match": "a", "sparsty": 0.5}],
        "prune.overrides.0.sparsty: unknown field; did you mean 'sparsity'?",
    ),
    ("prune.overrides", [{"match": "a", "sparsity": 2.0}], "prune.overrides.0.sparsity: got 2.0"),
    ("train.epochs", "6", "train.epochs: got '6'"),
    ("train.epochs", -1, "train.epochs: got -1"),
    ("train.epochs", 6.0, "train.epochs: got 6.0"),
    ("train.epochs", 3, "recover.epochs = 4 rewinds further than the 3 epochs"),
    ("train.optimizer", "sdg", "did you mean 'sgd'?"),
    (
        "train.optimizer",
        {"name": "sgd", "momentun": 0.9},
        "train.optimizer.momentun: sgd has no such option; did you mean 'momentum'?",
    ),
    ("train.optimizer", {"name": "sgd", "lr": -1.0}, "Invalid learning rate"),
    ("train.optimizer", {"name": "sgd", "lr": "0.1"}, "train.optimizer.lr: expected a finite number"),
    ("train.lr_schedule", "cosin", "did you mean 'cosine'?"),
    ("model", ..., "model: is missing"),
    ("model.factory", "os.system", "model.factory: got 'os.system'"),
    ("model.factory", "os:system('x')", "model.factory: got"),
    ("data.batch_size", 0, "data.batch_size: got 0"),
    ("task", "clasification", "did you mean 'classification'?"),
    ("export", ["onx"], "did you mean 'onnx'?"),
    ("name", "../../etc", "name: got '../../etc'"),
    ("seed", -1, "seed: got -1"),
    ("model.args", {"a": None}, "model.args: got"),
    ("model.args", {"a": [float("nan")]}, "finite numbers"),
    ("prune.overrides", 5, "prune.overrides: got 5"),
    ("prune.include", "conv*", "prune.include: got 'conv*'"),
    ("train.optimizer", {"name": "sgd", "lr": float("inf")}, "expected a finite number"),
    ("model.factory", "..x:y", "model.factory: got '..x:y'"),
    ("version", 2, "version: got 2"),
    ("recover.retrain", {"name": "fine_tune"}, "'fine_tune' needs epochs"),
    ("recover.retrain", {"name": "fine_tune", "epochs": 0}, "recover.epochs must be at least 1"),
    ("recover.batch_norm", "rematched", "recover.batch_norm: got 'rematched'"),
]


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=[f"{p}={v!r}" for p, v, _ in WRONG])
def test_wrong_fields_give_one_message(path: str, value: object, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        from_dict(changed(path, value), source="runs/recipe.toml")
    assert str(error.value).startswith("runs/recipe.toml: ")
    assert words in str(error.value)


PAIRS = [
    ({"pattern": "nm", "allocate": "global"}, ["NM(n=2, m=4)", "prune.allocate"]),
    ({"pattern": "nm", "schedule": {"name": "iterative", "rounds": 2}}, ["NM(n=2, m=4)", "schedule"]),
    ({"pattern": "nm", "overrides": [{"match": "a", "sparsity": 0.1}]}, ["NM(n=2, m=4)", "prune.overrides"]),
    ({"pattern": "nm", "target": {"sparsity": 0.9}}, ["NM(n=2, m=4)", "prune.target"]),
    ({"target": {"sparsity": 0.9}, "when": "during", "schedule": "one_shot"}, ["'during'", "'rounds'"]),
    (
        {
            "target": {"sparsity": 0.9},
            "when": "during",
            "schedule": {"name": "cubic", "begin": 0, "end": 9, "unit": "epochs"},
        },
        ["ends at epoch 9", "train.epochs = 6"],
    ),
    (
        {"target": {"sparsity": 0.9}, "schedule": {"name": "cubic", "begin": 0, "end": 4, "unit": "epochs"}},
        ["'weight_rewinding'", "exclude each other"],
    ),
    ({"target": {"macs": 0.5}, "score": {"name": "taylor"}}, ["prune.score Taylor", "coupled = true"]),
    ({"target": {"channels": 0.5}, "pattern": {"name": "channel"}}, ["prune.target channels", "coupled = true"]),
    (
        {"target": {"macs": 0.5}, "pattern": {"name": "channel", "coupled": True}, "allow_empty": True},
        ["coupled = true", "prune.allow_empty"],
    ),
    (
        {
            "target": {"macs": 0.5},
            "pattern": {"name": "channel", "coupled": True},
            "overrides": [{"match": "fc2", "sparsity": 0.25}],
        },
        ["coupled = true", "prune.overrides"],
    ),
    ({"target": {"macs": 0.5}, "pattern": {"name": "channel", "align": 4}}, ["add coupled = true"]),
    ({"target": {"macs": 0.5}, "pattern": {"name": "channel", "coupled": 1}}, ["prune.pattern.coupled", "boolean"]),
]


@pytest.mark.parametrize(("prune", "words"), PAIRS)
def test_impossible_pairs_name_both_parts(prune: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        from_dict(GOOD | {"prune": prune})
    for word in words:
        assert word in str(error.value)


def test_validation_imports_nothing_that_the_recipe_names(tmp_path: Path) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    from_dict(changed("model.factory", f"{trap}:net"))
    with pytest.raises(RecipeError):
        from_dict(changed("model.factory", f"{trap}:net") | {"tasks": 1})
    assert not (tmp_path / "sprung").exists()
