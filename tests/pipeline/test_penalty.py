"""Penalties in a recipe: where they act, that they act, and that nothing of them is lost when a run is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.checkpoint import load_tree
from secateur.errors import CheckpointError, RecipeError, SecateurError, WeightError
from secateur.penalties import PENALTIES
from secateur.pipeline.run import run
from secateur.recipe import from_dict

from .test_resume import BASE, ITERATIVE, REWOUND, assert_same, carry_out, in_child
from .tiny import net

PRESSED: dict[str, dict[str, Any]] = {
    "weight_decay": {"strength": 0.01, "proximal_step": True},
    "l1": {"strength": 1e-3, "proximal_step": True},
    "weight_elimination": {"delta": 1e-3, "every": 2},
    "group_lasso": {"strength": 3e-3, "by": "coupled", "proximal_step": True},
    "scale_l1": {"strength": 1e-2},
    "growing": {"share": 0.5, "step": 0.01, "every": 2, "by": "coupled"},
    "group_norm": {"strength": 1e-3, "by": "coupled", "every": 3},
    "chauvin": {"strength": 1e-2},
}


def recipe(name: str, base: dict[str, Any] = ITERATIVE, *, penalise: bool = True, **more: Any) -> dict[str, Any]:
    train = base["train"] | {"penalty": {"name": name, **PRESSED[name]}}
    return base | {"train": train, "recover": base["recover"] | {"penalise": penalise}} | more


def epochs(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == "epoch"]


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_penalty_is_here() -> None:
    assert PRESSED.keys() == set(PENALTIES)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.parametrize("name", PRESSED)
def test_killed_and_resumed_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Kills inside training, at the end of a stage, and inside the retraining, where the penalty goes on."""
    asked = from_dict(recipe(name, checkpoint={"every_steps": 1}))
    carry_out(asked, tmp_path / "whole")
    for kill_at in (4, 18, 25):
        directory = tmp_path / f"killed{kill_at}"
        assert in_child(asked, directory, kill_at=kill_at, resume=False) == -signal.SIGKILL
        assert load_tree(directory / "checkpoint.safetensors")["penalty"] is not None
        assert in_child(asked, directory, resume=True) == 0
        assert_same(tmp_path / "whole", directory)


@pytest.mark.parametrize("name", ["growing", "weight_elimination", "chauvin"])
def test_rewinding_with_nothing_pruned_repeats_the_training_under_its_penalty(name: str, tmp_path: Path) -> None:
    rewinding = REWOUND | {"prune": {"target": {"sparsity": 0.0}}}
    carry_out(from_dict(recipe(name, rewinding)), tmp_path)
    dense, rewound = load_file(tmp_path / "dense.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(dense[name], rewound[name]) for name in dense)


def test_it_acts_where_it_should_and_nowhere_else(tmp_path: Path) -> None:
    for kind, base in (("none", from_dict(ITERATIVE)), ("train", None), ("both", None)):
        asked = base or from_dict(recipe("l1", penalise=kind == "both"))
        carry_out(asked, tmp_path / kind)
    with_penalty = {
        kind: [(e["phase"], "penalty" in e) for e in epochs(tmp_path / kind)] for kind in ("none", "train", "both")
    }
    assert with_penalty["none"] == [("train", False)] * 3 + [("retrain", False)] * 4
    assert with_penalty["train"] == [("train", True)] * 3 + [("retrain", False)] * 4
    assert with_penalty["both"] == [("train", True)] * 3 + [("retrain", True)] * 4
    dense = {kind: load_file(tmp_path / kind / "dense.safetensors") for kind in with_penalty}
    zeros = {kind: int((d["5.weight"] == 0).sum()) for kind, d in dense.items()}
    assert zeros["none"] == 0 < zeros["train"] == zeros["both"]
    assert all(torch.equal(t, dense["both"][n]) for n, t in dense["train"].items())
    assert not torch.equal(
        load_file(tmp_path / "train" / "model.safetensors")["5.weight"],
        load_file(tmp_path / "both" / "model.safetensors")["5.weight"],
    )
    last = epochs(tmp_path / "train")[2]["penalty"]
    weights = [dense["train"][n] for n, p in net().named_parameters() if p.dim() > 1]
    assert last == pytest.approx(1e-3 * sum(float(w.abs().sum()) for w in weights))


def test_decay_in_the_recipe_is_the_optimizers_own(tmp_path: Path) -> None:
    plain = {"epochs": 3, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
    ours = plain | {"penalty": {"name": "weight_decay", "strength": 0.01, "include": ["*"]}}
    theirs = plain | {"optimizer": plain["optimizer"] | {"weight_decay": 0.01}}
    prune = {"prune": {"target": {"sparsity": 0.0}}}
    for kind, train in (("ours", ours), ("theirs", theirs)):
        carry_out(from_dict(BASE | prune | {"train": train}), tmp_path / kind)
    one, two = (load_file(tmp_path / kind / "dense.safetensors") for kind in ("ours", "theirs"))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_pruned_weights_stay_zero_and_a_checkpoint_of_another_penalty_is_refused(tmp_path: Path) -> None:
    done = run(from_dict(recipe("growing")), tmp_path / "a", report=True)
    for name, mask in done.masks.items():
        assert not done.model.get_parameter(name).detach()[~mask].any()
    carry_out(from_dict(ITERATIVE), tmp_path / "b")
    other = from_dict(recipe("l1"))
    (tmp_path / "b" / "recipe.toml").write_text(other.to_toml())
    with pytest.raises(CheckpointError, match="not the state of a penalty"):
        carry_out(other, tmp_path / "b", resume=True)


REFUSED: dict[str, tuple[dict[str, Any], type[SecateurError], str]] = {
    "an unknown name": ({"train": {"epochs": 1, "penalty": "l2"}}, RecipeError, "train.penalty: unknown penalty 'l2'"),
    "an unknown option": (
        {"train": {"epochs": 1, "penalty": {"name": "l1", "strenght": 1.0}}},
        RecipeError,
        "train.penalty.strenght: 'l1' has no such option; did you mean 'strength'?",
    ),
    "a negative strength": (
        {"train": {"epochs": 1, "penalty": {"name": "l1", "strength": -1.0}}},
        RecipeError,
        "train.penalty: l1: strength must be",
    ),
    "a word for a number": (
        {"train": {"epochs": 1, "penalty": {"name": "l1", "strength": "much"}}},
        RecipeError,
        "train.penalty.strength: got 'much'",
    ),
    "no training to act in": ({"train": {"epochs": 0, "penalty": "l1"}}, RecipeError, "would never act"),
    "nothing to go on with": (
        {"recover": {"penalise": True, "retrain": {"name": "learning_rate_rewinding", "epochs": 1}}},
        RecipeError,
        "and there is none",
    ),
    "no retraining to go on in": (
        {"train": {"epochs": 1, "penalty": "l1"}, "recover": {"penalise": True}},
        RecipeError,
        "recover.penalise has no retraining",
    ),
    "a pattern that matches nothing": (
        {"train": {"epochs": 1, "penalty": {"name": "l1", "exclude": ["fc*"]}}},
        WeightError,
        "'fc*' of a penalty matches no parameter",
    ),
    "a share of nothing": (
        {"train": {"epochs": 1, "penalty": {"name": "growing", "share": 0.01}}},
        RecipeError,
        "train.penalty: growing: share = 0.01",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_training(name: str, tmp_path: Path) -> None:
    changes, kind, words = REFUSED[name]
    with pytest.raises(kind) as error:
        run(from_dict(ITERATIVE | {"recover": {}} | changes), tmp_path / "r", report=False)
    assert words in str(error.value)
    assert not (tmp_path / "r").exists()


def test_round_trip() -> None:
    for name in PRESSED:
        asked = from_dict(recipe(name))
        again = from_dict(asked.to_dict())
        assert again == asked
        assert again.train.build_penalty() == asked.train.build_penalty()
    assert "penalty" not in from_dict(ITERATIVE).to_dict()["train"]
