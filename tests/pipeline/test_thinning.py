"""Parametrisations and dynamics in a recipe: what they reach, what excludes them, and that a kill loses nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from secateur.allocate import ErdosRenyiKernel
from secateur.bench.of_recipe import recipe_sensitivity
from secateur.checkpoint import load_tree
from secateur.cli.watch import describe
from secateur.errors import CheckpointError, PatternError, RecipeError, SecateurError, SecateurWarning
from secateur.method import Method
from secateur.patterns import NM, Block, Channel, Unstructured
from secateur.pipeline.data import batches, derive_seed, order_of, seed_everything
from secateur.pipeline.run import run
from secateur.recipe import from_dict
from secateur.recipe_checks import pattern_of
from secateur.scores import Random
from secateur.structure import load_pruned
from secateur.targets import Target
from secateur.training import DYNAMICS, L0, PARAMETRISATIONS, Reparametrised, RigL, SoftThreshold, SparseTraining, SrSte
from secateur.types import Masks, Moment

from .test_resume import BASE, ITERATIVE, assert_same, carry_out, in_child
from .tiny import data, net

RETRAIN = {"recover": {"retrain": {"name": "learning_rate_rewinding", "epochs": 1}}}
CUBIC = {"name": "cubic", "begin": 2, "end": 14, "every": 3}
LEARNT: dict[str, dict[str, Any]] = {
    "l0": {
        "parametrisation": {"name": "l0", "strength": 3e-5, "group": "output", "dropped": 0.9},
        "latents": {"lr": 10.0},
    },
    "variational_dropout": {
        "parametrisation": {"name": "variational_dropout", "strength": 0.01, "local": False},
        "latents": {"lr": 3.0},
    },
    "soft_threshold": {"parametrisation": {"name": "soft_threshold", "start_threshold": -3.0}},
    "movement": {
        "parametrisation": {"name": "movement", "sparsity": 0.75, "schedule": CUBIC},
        "latents": {"lr": 0.01, "weight_decay": 0.0},
    },
    "soft_movement": {
        "parametrisation": {"name": "soft_movement", "strength": 0.03, "threshold": -1.0},
        "latents": {"lr": 3.0},
    },
    "sr_ste": {"parametrisation": {"name": "sr_ste", "n": 2, "m": 4}},
}
LEFT_ALONE = {"l0": "7*", "sr_ste": "0*"}  # the answers themselves; nine inputs are not a multiple of four
ASKED = {"movement": 0.75, "sr_ste": 0.5}
MOVING: dict[str, dict[str, Any]] = {
    "static": {},
    "set": {"seed": 0, "every": 4, "unit": "steps"},
    "rigl": {"end": 15, "every": 4},
    "granet": {"end": 12, "every": 3, "unit": "steps"},
    "ac_dc": {"total": 18, "warm_up": 3, "sparse": 3, "dense": 3, "last_dense": 3, "last_sparse": 3, "unit": "steps"},
    "soft_filter": {"end": 3},
}


def learnt(name: str, **more: Any) -> dict[str, Any]:
    skip = {"prune": {"exclude": [LEFT_ALONE[name]]}} if name in LEFT_ALONE else {}
    return BASE | {"train": BASE["train"] | LEARNT[name]} | RETRAIN | skip | more


def moving(name: str, **more: Any) -> dict[str, Any]:
    prune: dict[str, Any] = {"target": {"sparsity": 0.7}, "when": "during"}
    if name in ("static", "set", "rigl"):
        prune |= {"score": {"name": "random", "seed": 0}, "allocate": "erk"}
    if name == "soft_filter":
        prune |= {"target": {"sparsity": 0.5}, "pattern": "channel", "allocate": "layerwise", "exclude": ["7*"]}
    train = BASE["train"] | {"dynamics": {"name": name, **MOVING[name]}}
    return BASE | {"train": train, "prune": prune} | RETRAIN | more


RECIPES = {name: learnt(name) for name in LEARNT} | {name: moving(name) for name in MOVING}


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_every_part_is_here() -> None:
    assert LEARNT.keys() == set(PARAMETRISATIONS)
    assert MOVING.keys() == set(DYNAMICS)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Kills at the start, inside training, on both sides of its end, and inside the retraining."""
    asked = from_dict(RECIPES[name] | {"checkpoint": {"every_steps": 1}})
    carry_out(asked, tmp_path / "whole")
    for kill_at in (1, 8, 18, 19, 22):
        directory = tmp_path / f"killed{kill_at}"
        assert in_child(asked, directory, kill_at=kill_at, resume=False) == -signal.SIGKILL
        assert in_child(asked, directory, resume=True) == 0
        assert_same(tmp_path / "whole", directory)


@pytest.mark.parametrize("name", RECIPES)
def test_zeros_stay_and_the_result_says_what_was_asked_or_found(name: str, tmp_path: Path) -> None:
    done = run(from_dict(RECIPES[name]), tmp_path / "run")
    prune = done.result["prune"]
    weights = {row["name"]: done.model.get_parameter(row["name"]).detach() for row in prune["layers"]}
    zeros = sum(int((~done.masks[n]).sum()) for n in weights)
    assert prune["achieved"] == prune["sparsity"] or name == "soft_filter"
    assert prune["sparsity"] == pytest.approx(zeros / sum(w.numel() for w in weights.values()))
    assert zeros > 0
    assert prune["finished"]
    for mask_name, mask in done.masks.items():
        assert not done.model.get_parameter(mask_name).detach()[~mask].any()
    page = (tmp_path / "run" / "report.html").read_text()
    if name in LEARNT and name not in ASKED:
        assert prune["found"] == prune["achieved"]
        assert prune["asked"] is prune["goal"] is None
        assert "found by training" in page
        assert "asked" not in page.split("Recipe</h4>")[0].replace("asked for", "")
    else:
        assert prune["asked"] == prune["goal"] == ASKED.get(name, 0.5 if name == "soft_filter" else 0.7)
        assert prune["achieved"] == pytest.approx(prune["asked"], abs=1e-3)
        assert "found" not in prune
        assert "found by training" not in page
    phases = [(e["phase"], e["lr"]) for e in events(tmp_path / "run", "epoch")]
    assert [phase for phase, _ in phases] == ["train"] * 3 + ["retrain"]
    assert phases[3][1] == phases[2][1]


def test_l0_is_the_loop_that_anyone_would_write(tmp_path: Path) -> None:
    """The same training by hand: order, dropout, learning rates and latents of their own."""
    recipe = from_dict(learnt("l0", recover={}))
    done = run(recipe, tmp_path, report=False)
    seed_everything(derive_seed(3, "init"))
    model, train = net(), data().train
    wrapped = Reparametrised(
        model,
        L0(3e-5, "output", dropped=0.9),
        exclude=["7*"],
        example_inputs=(data().train[0][:1],),
        seed=derive_seed(3, "parametrisation"),
    )
    optimizer = torch.optim.SGD(
        [
            {"params": list(model.parameters())},
            {"params": list(wrapped.latents.parameters()), "lr": 10.0, "weight_decay": 0.0},
        ],
        lr=0.05,
        momentum=0.9,
        weight_decay=1e-3,
    )
    for epoch in range(3):
        seed_everything(derive_seed(3, "noise", "train", epoch))
        wrapped.train()
        for i, (x, y) in enumerate(batches(train, 8, order=order_of(train, 3, "train", epoch))):
            factor = 0.1 + 0.9 * (1 + torch.cos(torch.tensor(torch.pi * (epoch + i / 6) / 3)).item()) / 2
            for group, lr in zip(optimizer.param_groups, (0.05, 10.0), strict=True):
                group["lr"] = lr * factor
            (nn.functional.cross_entropy(wrapped(x), y) + wrapped.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            wrapped.step()
    finished = wrapped.finish_()
    assert done.masks.keys() == finished.masks.keys()
    for name, mask in finished.masks.items():
        assert torch.equal(done.masks[name], mask)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(done.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_rigl_is_the_loop_that_anyone_would_write(tmp_path: Path) -> None:
    recipe = from_dict(moving("rigl", recover={}) | {"train": moving("rigl")["train"] | {"lr_schedule": "constant"}})
    done = run(recipe, tmp_path, report=False)
    seed_everything(derive_seed(3, "init"))
    model, train = net(), data().train
    dense = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    method = Method(target=Target("sparsity", 0.7), score=Random(0), allocate=ErdosRenyiKernel())
    trainer = SparseTraining(model, method, RigL(end=15, every=4), optimizer=optimizer)
    trainer.start()
    first = {n: m.clone() for n, m in trainer.masks.items()}
    for epoch in range(3):
        seed_everything(derive_seed(3, "noise", "train", epoch))
        model.train()
        for x, y in batches(train, 8, order=order_of(train, 3, "train", epoch)):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            trainer.step()
            optimizer.zero_grad()
    for name, mask in trainer.masks.items():
        assert torch.equal(done.masks[name], mask)
    assert any(not torch.equal(first[n], m) for n, m in done.masks.items())
    for name, value in model.state_dict().items():
        assert torch.equal(done.model.state_dict()[name], value)
    assert [e["step"] for e in events(tmp_path, "prune")] == [0, 4, 8, 12]
    saved = load_file(tmp_path / "dense.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in dense.items())


def test_closed_gates_are_cut_out(tmp_path: Path) -> None:
    done = run(from_dict(learnt("l0", recover={})), tmp_path, report=False)
    assert done.result["realised"] == "slice"
    small = net()
    load_pruned(small, tmp_path / "pruned")
    kept = {name: int(done.masks[name].flatten(1).any(1).sum()) for name in ("0.weight", "5.weight")}
    assert (small[0].out_channels, small[5].out_features) == tuple(kept.values())
    assert kept["0.weight"] < 4
    assert kept["5.weight"] < 16
    images = data().test[0]
    torch.testing.assert_close(small.eval()(images), done.model.eval()(images), rtol=1e-4, atol=1e-5)
    totals = [done.result["profile"][which]["params"]["total"] for which in ("dense", "pruned")]
    assert totals[1] == sum(p.numel() for p in small.parameters()) < totals[0]
    assert not any("constant" in note for note in done.result["notes"])


def test_a_constant_that_is_cut_out_is_said(tmp_path: Path) -> None:
    """Gates on inputs leave the bias of a unit that has lost all of them."""
    train = BASE["train"] | {"parametrisation": {"name": "l0", "strength": 0.03}, "latents": {"lr": 2.0}}
    with pytest.warns(SecateurWarning, match="nothing is left of"):
        done = run(from_dict(BASE | {"train": train}), tmp_path, report=False)
    small, images = net(), data().test[0]
    load_pruned(small, tmp_path / "pruned")
    with torch.no_grad():
        masked, cut = done.model.eval()(images[:1]), small.eval()(images[:1])
    said = [note for note in done.result["notes"] if "constant" in note]
    assert f"up to {float((masked - cut).abs().max() / masked.abs().max()):.2g} of the largest" in said[0]


def test_dynamics_and_weights_that_are_there(tmp_path: Path) -> None:
    """With trained weights there is a dense network to compare with, and to learn from, also while masks move."""
    carry_out(from_dict(ITERATIVE), tmp_path / "dense")
    model = BASE["model"] | {"weights": str(tmp_path / "dense" / "dense.safetensors")}
    for name in ("granet", "movement"):
        recipe = RECIPES[name] | {"model": model}
        recipe["recover"] = RETRAIN["recover"] | {"distill": {"weight": 0.5}}
        done = run(from_dict(recipe), tmp_path / name, report=False)
        assert done.result["quality"].keys() == {"dense", "pruned"}
        plain = run(from_dict(RECIPES[name] | {"model": model}), tmp_path / f"{name} alone", report=False)
        assert events(tmp_path / name, "epoch")[0]["train_loss"] != events(plain.directory, "epoch")[0]["train_loss"]


def test_weights_of_a_sparse_training_go_back_under_its_masks(tmp_path: Path) -> None:
    recipe = moving("rigl", recover={"retrain": {"name": "weight_rewinding", "rewind_to": 0}})
    done = run(from_dict(recipe), tmp_path, report=False)
    kept = load_tree(tmp_path / "rewind.safetensors")["model"]
    assert len(events(tmp_path, "epoch")) == 6
    assert done.result["prune"]["achieved"] == pytest.approx(0.7, abs=1e-3)
    assert not torch.equal(kept["5.weight"], done.model.get_parameter("5.weight"))


def test_the_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    carry_out(from_dict(moving("rigl")), tmp_path)
    for other in (learnt("l0"), moving("granet")):
        recipe = from_dict(other)
        (tmp_path / "recipe.toml").write_text(recipe.to_toml())
        with pytest.raises(CheckpointError, match=r"another|not the state"):
            carry_out(recipe, tmp_path, resume=True)


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(name: str) -> None:
    recipe = from_dict(RECIPES[name])
    again = from_dict(recipe.to_dict())
    assert again == recipe
    assert again.train.build_parametrisation() == recipe.train.build_parametrisation()
    assert again.train.build_dynamics() == recipe.train.build_dynamics()
    if name in LEARNT:  # what has no part in the run is not written down as if it had
        assert recipe.to_dict().get("prune") == ({"exclude": [LEFT_ALONE[name]]} if name in LEFT_ALONE else None)


@dataclass(frozen=True)
class Theirs(SrSte):
    """What another package may bring: it ends in a pattern that only it knows of."""

    @property
    def pattern(self) -> Block:  # type: ignore[override]
        return Block(1, 2)

    def _masks(self, at: Moment) -> Masks:
        out: Masks = {}
        for name, layout in at.layouts.items():
            scores = self.pattern.reduce(layout, at.weights[name].detach().abs())
            out |= self.pattern.expand(layout, self.pattern.select(layout, scores, scores.numel() // 2))
        return out


def test_a_parametrisation_says_itself_in_which_pattern_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARAMETRISATIONS._parts, "theirs", Theirs)
    recipe = _prune(_train(learnt("sr_ste"), parametrisation="theirs"), pattern={"name": "block", "rows": 1, "cols": 2})
    done = run(from_dict(recipe), tmp_path, report=False)
    for mask in done.masks.values():
        pairs = mask.flatten(1).reshape(-1, 2)
        assert torch.equal(pairs[:, 0], pairs[:, 1])
        assert int(mask.sum()) * 2 == mask.numel()
    with pytest.raises(RecipeError, match=r"exclude each other: it removes Block\(rows=1, cols=2, "):
        from_dict(_prune(recipe, pattern={"name": "nm", "n": 2, "m": 4}))
    assert pattern_of(Theirs()) == Block(1, 2)
    assert pattern_of(SrSte(1, 4)) == NM(1, 4)
    assert [pattern_of(L0(group=g)) for g in ("unit", "input", "output")] == [Channel()] * 3
    assert pattern_of(L0(group="weight")) == pattern_of(SoftThreshold()) == Unstructured()


def _train(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return base | {"train": base["train"] | changes}


def _prune(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return base | {"prune": base.get("prune", {}) | changes}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": (_train(moving("rigl"), parametrisation="l0"), "exclude each other: both make the masks"),
    "unknown parametrisation": (_train(BASE, parametrisation="l1"), "train.parametrisation: unknown parametrisation"),
    "unknown dynamics": (_train(moving("rigl"), dynamics="rigel"), "did you mean 'rigl'"),
    "unknown option": (
        _train(BASE, parametrisation={"name": "l0", "strenght": 1.0}),
        "train.parametrisation.strenght: 'l0' has no such option",
    ),
    "schedule of no kind": (
        _train(BASE, parametrisation={"name": "movement", "schedule": 3}),
        "train.parametrisation.schedule: expected a name",
    ),
    "schedule with a wrong option": (
        _train(BASE, parametrisation={"name": "movement", "schedule": CUBIC | {"power": 3}}),
        "train.parametrisation.schedule.power: 'cubic' has no such option",
    ),
    "schedule in epochs": (
        _train(BASE, parametrisation={"name": "movement", "schedule": CUBIC | {"unit": "epochs"}}),
        "train.parametrisation: movement: the schedule counts epochs",
    ),
    "parametrisation without training": (_train(learnt("l0"), epochs=0), "train.epochs is 0"),
    "dynamics without training": (_train(moving("static"), epochs=0), "train.epochs is 0"),
    "latents of nothing": (_train(moving("rigl"), latents={"lr": 1.0}), "train.latents is about"),
    "latents at no rate": (_train(learnt("l0"), latents={"lr": 0.0}), "train.latents.lr: got 0.0"),
    "a schedule that prunes during training": (
        _prune(learnt("l0"), when="during", schedule=CUBIC),
        "prune.schedule exclude each other",
    ),
    "rounds": (
        _prune(learnt("movement"), schedule={"name": "iterative", "rounds": 2}),
        "prune.schedule exclude each other",
    ),
    "a score": (_prune(learnt("l0"), score={"name": "random", "seed": 0}), "prune.score exclude each other"),
    "an allocation": (_prune(learnt("l0"), allocate="layerwise"), "prune.allocate exclude each other"),
    "a solver": (_prune(learnt("l0"), solver="optimal_brain_surgeon"), "prune.solver exclude each other"),
    "an ablation": (_prune(learnt("l0"), ablate="shuffle"), "prune.ablate exclude each other"),
    "a pattern that does not fit": (_prune(learnt("movement"), pattern="channel"), "it removes Unstructured()"),
    "another N:M": (_prune(learnt("sr_ste"), pattern={"name": "nm", "n": 1, "m": 4}), "it removes NM(n=2, m=4)"),
    "gates on weights and channels": (
        _prune(_train(BASE, parametrisation={"name": "l0", "group": "weight"}), pattern="channel"),
        "prune.pattern",
    ),
    "a target for what is found": (_prune(learnt("l0"), target={"sparsity": 0.9}), "found by training and not set"),
    "movement's own target": (
        _prune(learnt("movement"), target={"sparsity": 0.9}),
        "prune.target sparsity = 0.9 and train.parametrisation",
    ),
    "another target": (_prune(learnt("movement"), target={"macs": 0.25}), "a target of its own, sparsity = 0.75"),
    "rewinding what is made": (
        learnt("l0", recover={"retrain": {"name": "weight_rewinding", "rewind_to": 0}}),
        "'weight_rewinding' and train.parametrisation",
    ),
    "no target for dynamics": (_prune(moving("rigl"), target=None), "prune.target is missing"),
    "dynamics after training": (_prune(moving("rigl"), when="after"), "say when = 'during'"),
    "dynamics and a schedule": (_prune(moving("rigl"), schedule=CUBIC | {"unit": "steps"}), "both say when"),
    "dynamics and a solver": (_prune(moving("rigl"), solver="optimal_brain_surgeon"), "training makes up for what"),
    "dynamics and an ablation": (_prune(moving("rigl"), ablate="shuffle"), "prune.ablate 'shuffle' exclude each other"),
    "dynamics and coupled channels": (
        _prune(moving("rigl"), pattern={"name": "channel", "coupled": True}),
        "no gradient reaches it",
    ),
    "dynamics and N:M": (
        _prune(moving("rigl"), pattern={"name": "nm", "n": 2, "m": 4}, target=None, allocate=None),
        "any number may stay",
    ),
    "a score that watches, too late": (_prune(moving("rigl"), score="movement"), "before any training"),
    "no teacher": (
        learnt("movement", recover=RETRAIN["recover"] | {"distill": {"weight": 0.5}}),
        "recover.distill learns from a dense network, and there is none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_it_is_read(name: str) -> None:
    values, words = REFUSED[name]
    values = (
        values | {"prune": {k: v for k, v in values["prune"].items() if v is not None}} if "prune" in values else values
    )
    with pytest.raises(RecipeError) as error:
        from_dict(values)
    assert words in str(error.value)


REFUSED_LATER: dict[str, tuple[dict[str, Any], type[SecateurError], str]] = {
    "a schedule past the end": (
        _train(BASE, parametrisation={"name": "movement", "schedule": CUBIC | {"end": 20}}),
        RecipeError,
        "3 epochs of 6 steps, 18 in all: its target 0.9 would never be reached",
    ),
    "moves past the end": (
        _train(moving("rigl"), dynamics={"name": "rigl", "end": 25, "every": 4}),
        RecipeError,
        "makes its last move after 24 steps",
    ),
    "epochs past the end": (
        _train(moving("soft_filter"), dynamics={"name": "soft_filter", "end": 4}),
        RecipeError,
        "makes its last move after 4 epochs",
    ),
    "no move at all": (
        _train(moving("set"), dynamics={"name": "set", "seed": 0, "every": 4}),
        RecipeError,
        "would never move: the training has 3 epochs",
    ),
    "latents of what has none": (_train(learnt("sr_ste"), latents={"lr": 1.0}), RecipeError, "trains nothing beside"),
    "a weight that does not fit": (
        _prune(learnt("sr_ste"), exclude=[]),
        PatternError,
        "train.parametrisation: 0.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED_LATER)
def test_refused_before_any_training(name: str, tmp_path: Path) -> None:
    values, kind, words = REFUSED_LATER[name]
    with pytest.raises(kind) as error:
        run(from_dict(values), tmp_path / "r", report=False)
    assert words in str(error.value)
    assert not (tmp_path / "r").exists()


def test_the_terminal_says_found() -> None:
    event = {"event": "prune", "target": "sparsity", "asked": None, "achieved": 0.75, "kept": 1, "total": 4}
    assert describe(event) == "pruned to sparsity 0.75 (found by training), 1 of 4 weights kept"
    assert "(asked 0.5)" in describe(event | {"asked": 0.5})


def test_sensitivity_needs_a_score_that_a_parametrisation_has_not() -> None:
    untrained = {"model": BASE["model"] | {"weights": "x.safetensors"}}
    with pytest.raises(RecipeError, match="sensitivity needs a score"):
        recipe_sensitivity(from_dict(learnt("l0") | untrained))
    with pytest.raises(SecateurError, match=r"x\.safetensors"):  # with dynamics there is one: it goes on to the weights
        recipe_sensitivity(from_dict(moving("rigl") | untrained))
