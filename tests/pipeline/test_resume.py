"""A run killed at any instant and taken up again ends bit for bit as one that was not. The kills are real."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur import Method, Target
from secateur.checkpoint import load_tree
from secateur.errors import CheckpointError, RecipeError
from secateur.pipeline.data import derive_seed, seed_everything
from secateur.pipeline.events import EventLog, Silent
from secateur.pipeline.optim import Cosine
from secateur.pipeline.plan import Plan, Stage
from secateur.pipeline.run import Runner, run
from secateur.recipe import Recipe, from_dict
from secateur.recover import LearningRateRewinding, WeightRewinding
from secateur.recover.retrain import Recovery

from .tiny import data, net

BASE = {
    "name": "tiny",
    "seed": 3,
    "threads": 1,
    "model": {"factory": "tests.pipeline.tiny:net"},
    "data": {"factory": "tests.pipeline.tiny:data", "batch_size": 8},
    "train": {
        "epochs": 3,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
        "lr_schedule": {"name": "cosine", "end": 0.1},
    },
    "export": [],
    "measure": {"latency": False, "energy": False},
}

ITERATIVE = BASE | {
    "prune": {"target": {"sparsity": 0.8}, "schedule": {"name": "iterative", "rounds": 2}},
    "recover": {"retrain": {"name": "learning_rate_rewinding", "epochs": 2}},
}
REWOUND = BASE | {
    "prune": {
        "target": {"compression_ratio": 3.0},
        "score": {"name": "weight_gradient"},
        "schedule": {"name": "iterative", "rounds": 2},
    },
    "recover": {"retrain": {"name": "weight_rewinding", "epochs": 2}, "batch_norm": "reestimate"},
}
GRADUAL = BASE | {
    "prune": {
        "target": {"sparsity": 0.7},
        "when": "during",
        "schedule": {"name": "cubic", "begin": 2, "end": 14, "every": 3, "unit": "steps"},
    },
    "checkpoint": {"every_steps": 2},
}
MAPPED = GRADUAL | {
    "data": {"factory": "tests.pipeline.tiny:noisy", "batch_size": 8},
    "checkpoint": {"every_steps": 1},
}
COUPLED = BASE | {
    "prune": {
        "target": {"macs": 0.5},
        "score": {"name": "taylor"},
        "pattern": {"name": "channel", "coupled": True, "align": 2},
        "when": "during",
        "schedule": {"name": "cubic", "begin": 2, "end": 14, "every": 3, "unit": "steps"},
    },
    "checkpoint": {"every_steps": 2},
}
WATCHED = ITERATIVE | {
    "prune": ITERATIVE["prune"] | {"score": {"name": "karnin"}},
    "checkpoint": {"every_steps": 2},
}
WATCHED_REWOUND = REWOUND | {"prune": REWOUND["prune"] | {"score": {"name": "movement"}}}
TICKET = BASE | {  # back into the middle of an epoch, with data and dropout that draw from every generator
    "data": {"factory": "tests.pipeline.tiny:noisy", "batch_size": 8},
    "prune": {"target": {"sparsity": 0.6}, "schedule": {"name": "iterative", "rounds": 2}},
    "recover": {"retrain": {"name": "weight_rewinding", "rewind_to": 8, "unit": "steps"}},
    "checkpoint": {"every_steps": 1},
}
DISTILLED = ITERATIVE | {
    "recover": {"retrain": {"name": "learning_rate_rewinding", "epochs": 2}, "distill": {"weight": 0.7}},
    "checkpoint": {"every_steps": 3},
}
RECIPES = {
    "watched": WATCHED,
    "watched rewound": WATCHED_REWOUND,
    "iterative": ITERATIVE,
    "rewound": REWOUND,
    "gradual": GRADUAL,
    "mapped": MAPPED,
    "coupled": COUPLED,
    "ticket": TICKET,
    "distilled": DISTILLED,
}


class Killer(Silent):
    """Ends its own process, without any goodbye, at the n-th optimizer step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def progress(self, done: int, total: int, text: str) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def carry_out(recipe: Recipe, directory: Path, *, kill_at: int = 0, resume: bool = False) -> None:
    run(
        recipe,
        directory,
        resume=resume,
        listener=Killer(kill_at) if kill_at else None,
        report=False,
    )


def in_child(
    recipe: Recipe, directory: Path, *, kill_at: int = 0, kill_after: float | None = None, resume: bool
) -> int:
    """Run in a forked child; return its exit status as the shell would."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            carry_out(recipe, directory, kill_at=kill_at, resume=resume)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, object]]]:
    events = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        events.append({k: v for k, v in event.items() if k not in ("time", "seconds")})
    return load_file(directory / "model.safetensors"), load_file(directory / "masks.safetensors"), events


def assert_same(first: Path, second: Path) -> None:
    for ours, theirs in zip(outcome(first)[:2], outcome(second)[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    assert outcome(first)[2] == outcome(second)[2]


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_a_step_and_resumed(name: str, tmp_path: Path) -> None:
    recipe = from_dict(RECIPES[name])
    carry_out(recipe, tmp_path / "whole")
    for kill_at in (1, 3, 9, 17, 20):
        directory = tmp_path / f"killed{kill_at}"
        status = in_child(recipe, directory, kill_at=kill_at, resume=False)
        if status == 0:
            continue  # the run is shorter than that
        assert status == -signal.SIGKILL
        assert in_child(recipe, directory, resume=True) == 0
        assert_same(tmp_path / "whole", directory)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.parametrize("name", RECIPES)
def test_killed_again_and_again_at_random_instants(name: str, tmp_path: Path) -> None:
    recipe = from_dict(RECIPES[name])
    began = time.monotonic()
    carry_out(recipe, tmp_path / "whole")
    whole = time.monotonic() - began
    source = random.Random(name)
    kills, directory = 0, tmp_path / "killed0"
    while kills < 8:
        # From the first moments to a little before the end: inside training, pruning and writing.
        resume = (directory / "recipe.toml").exists()
        status = in_child(recipe, directory, kill_after=source.uniform(0.02, 0.6) * whole, resume=resume)
        kills += status == -signal.SIGKILL
        if status == 0:
            assert_same(tmp_path / "whole", directory)
            directory = tmp_path / f"killed{kills}"
    assert in_child(recipe, directory, resume=(directory / "recipe.toml").exists()) == 0
    assert_same(tmp_path / "whole", directory)


@pytest.mark.parametrize(
    "point",
    [
        {"epochs": 2},
        {"rewind_to": 0},
        {"rewind_to": 2},
        *({"rewind_to": k, "unit": "steps"} for k in (0, 1, 5, 12, 17)),
    ],
    ids=str,
)
@pytest.mark.parametrize("factory", ["data", "noisy"])
def test_rewinding_with_nothing_pruned_repeats_the_training_bit_for_bit(
    factory: str, point: dict[str, object], tmp_path: Path
) -> None:
    recipe = from_dict(
        BASE
        | {
            "data": {"factory": f"tests.pipeline.tiny:{factory}", "batch_size": 8},
            "prune": {"target": {"sparsity": 0.0}},
            "recover": {"retrain": {"name": "weight_rewinding", **point}},
        }
    )
    carry_out(recipe, tmp_path)
    dense, rewound = load_file(tmp_path / "dense.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(dense[name], rewound[name]) for name in dense)
    epochs = [e for e in outcome(tmp_path)[2] if e["event"] == "epoch"]
    trained, again = ([e for e in epochs if e["phase"] == phase] for phase in ("train", "retrain"))
    for key in ("lr", "train_loss", "loss"):  # the mean loss of an epoch taken up half-way is that of the whole
        assert [e[key] for e in again] == [e[key] for e in trained[-len(again) :]]


@pytest.mark.parametrize("recovery", [WeightRewinding(rewind_to=1), LearningRateRewinding(epochs=29)], ids=str)
def test_a_repeated_epoch_has_the_very_learning_rates_of_the_first(recovery: Recovery) -> None:
    plan = Plan(Method(target=Target("sparsity", 0.5)), recovery, 30, Cosine(), 0.1, steps_per_epoch=49)
    train, retrain = Stage("train", 30), Stage("retrain", 29, 0)
    for epoch, batch in itertools.product(range(29), range(49)):
        assert plan.lr(retrain, epoch, batch) == plan.lr(train, 1 + epoch, batch)


def test_the_original_ticket_goes_back_to_the_initial_weights(tmp_path: Path) -> None:
    recipe = from_dict(
        BASE
        | {
            "prune": {"target": {"sparsity": 0.6}},
            "recover": {"retrain": {"name": "weight_rewinding", "rewind_to": 0}},
        }
    )
    run(recipe, tmp_path, report=False)
    saved = load_tree(tmp_path / "rewind.safetensors")["model"]
    seed_everything(derive_seed(recipe.seed, "init"))
    assert all(torch.equal(value, saved[name]) for name, value in net().state_dict().items())
    events = [e for e in outcome(tmp_path)[2] if e["event"] == "epoch" and e["phase"] == "retrain"]
    assert len(events) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either recover.epochs"),
        ({"epochs": 1, "rewind_to": 1}, "either recover.epochs"),
        ({"epochs": 1, "unit": "steps"}, "leave unit out"),
        ({"rewind_to": -1}, "at least 0"),
        ({"rewind_to": 3}, "leaves nothing to train again"),
        ({"rewind_to": 1, "unit": "rounds"}, "epochs"),
        ({"epochs": 4}, "rewinds further than the 3 epochs"),
    ],
)
def test_points_outside_the_training_are_refused(options: dict[str, object], words: str) -> None:
    retrain = {"name": "weight_rewinding", **options}
    with pytest.raises(RecipeError) as error:
        from_dict(BASE | {"prune": {"target": {"sparsity": 0.5}}, "recover": {"retrain": retrain}})
    assert words in str(error.value)


def test_a_step_outside_the_training_is_refused_before_any_training(tmp_path: Path) -> None:
    retrain = {"name": "weight_rewinding", "rewind_to": 18, "unit": "steps"}
    recipe = from_dict(BASE | {"prune": {"target": {"sparsity": 0.5}}, "recover": {"retrain": retrain}})
    with pytest.raises(RecipeError, match=r"18 \(3 epochs of 6 steps\)"):
        carry_out(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    untrained = BASE | {"train": {"epochs": 0}, "prune": {"target": {"sparsity": 0.5}}, "recover": {"retrain": retrain}}
    with pytest.raises(RecipeError, match=r"train\.epochs = 0"):
        from_dict(untrained)


@pytest.mark.parametrize("point", [{"epochs": 2}, {"rewind_to": 7, "unit": "steps"}], ids=str)
def test_rewound_weights_are_the_checkpoint_times_the_mask(point: dict[str, object], tmp_path: Path) -> None:
    recipe = from_dict(REWOUND | {"recover": {"retrain": {"name": "weight_rewinding", **point}}})
    carry_out(recipe, tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    runner = Runner(recipe, tmp_path, net(), data(), Silent())
    runner.log = EventLog(tmp_path / "metrics.jsonl")
    runner.run_stage(Stage("prune", round=0))
    runner.start(Stage("retrain", 2, 0))
    saved = load_tree(tmp_path / "rewind.safetensors")
    masks = runner.thinning.masks
    assert 0.3 < runner.thinning.sparsity < 0.9
    for name, value in runner.model.state_dict().items():
        expected = saved["model"][name]
        if name in masks:
            expected = expected * masks[name]
        assert torch.equal(value, expected), name
    for index, (name, parameter) in enumerate(runner.model.named_parameters()):
        momentum = runner.optimizer.state[parameter]["momentum_buffer"]
        expected = saved["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(momentum, expected * masks[name] if name in masks else expected), name


def test_a_directory_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    recipe = from_dict(GRADUAL)
    carry_out(recipe, tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run"):
        carry_out(recipe, tmp_path)
    with pytest.raises(CheckpointError, match="differs from this recipe"):
        carry_out(from_dict(GRADUAL | {"seed": 4}), tmp_path, resume=True)
