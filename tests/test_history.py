"""A pruner's reports survive its state; no value in a state gets past unchecked."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.checkpoint import load_tree, save_tree
from secateur.errors import CheckpointError
from secateur.history import plain_history, read_history
from secateur.method import Method
from secateur.patterns import Channel
from secateur.pruner import Pruner
from secateur.schedules import iterative
from secateur.targets import Target
from secateur.types import PruneReport

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def single(rounds: int = 3) -> Pruner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Embedding(4, 4), nn.Linear(16, 2))
    return Pruner(model, Method(target=Target("sparsity", 0.5), schedule=iterative(rounds=rounds)))


def coupled(rounds: int = 3) -> Pruner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    pattern = Channel(coupled=True, align=4)
    method = Method(target=Target("macs", 0.5), schedule=iterative(rounds=rounds), pattern=pattern)
    return Pruner(model, method, example_inputs=X)


MAKERS = [single, coupled]


@pytest.mark.parametrize("make", MAKERS)
def test_reports_are_there_again(make: Any, tmp_path: Path) -> None:
    pruner = make()
    for _ in range(2):
        pruner.prune()
    wanted = list(pruner.history)
    save_tree(tmp_path / "state", pruner.state_dict())
    again = make()
    again.load_state_dict(load_tree(tmp_path / "state"))
    assert again.history == wanted
    assert again.history[0].layers[0].kept > again.history[1].layers[0].kept
    again.prune()
    pruner.prune()
    assert again.history == pruner.history
    assert len(again.history) == 3
    assert read_history(json.loads(json.dumps(plain_history(pruner.history)))) == pruner.history


def test_a_state_without_reports_still_loads() -> None:
    """As version 1 wrote it."""
    pruner = single()
    pruner.prune()
    state = pruner.state_dict()
    del state["history"]
    state["version"] = 1
    again = single()
    again.prune()
    again.load_state_dict(state)
    assert again.history == []  # not those of before: they are of another training
    assert again.updates == 1
    assert all(torch.equal(again.masks[n], m) for n, m in pruner.masks.items())
    again.prune()
    assert len(again.history) == 1


def test_what_is_shared_is_written_once() -> None:
    pruner = single(rounds=50)
    while not pruner.finished:
        pruner.prune()
    plain = plain_history(pruner.history)
    assert len(plain["reports"]) == 50
    assert len(plain["tables"]) == 1
    changed = PruneReport("sparsity", 0.1, 0.1, 0.5, False, 0.1, (), {"a": "b"})
    assert read_history(plain_history([*pruner.history, changed])) == [*pruner.history, changed]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


JUNK = [
    None,
    "x",
    "",
    -1,
    10**400,
    True,
    0.5,
    float("nan"),
    float("inf"),
    [],
    [[]],
    {},
    {"a": 1},
    {1: 2},
    torch.ones(2),
    b"x",
]


@pytest.mark.parametrize("make", MAKERS)
def test_junk_anywhere_is_refused_or_is_what_it_says(make: Any) -> None:
    pruner = make(2)
    pruner.prune()
    pruner.prune()
    plain = plain_history(pruner.history)
    refused = 0
    for path in places(plain):
        for junk in JUNK:
            bad: Any = copy.deepcopy(plain)
            at: Any = {"root": bad}
            for key in (steps := ("root", *path))[:-1]:
                at = at[key]
            at[steps[-1]] = junk
            try:
                read = read_history(at["root"] if len(steps) == 1 else bad)
            except CheckpointError:
                refused += 1
                continue
            assert read_history(plain_history(read)) == read
    assert refused > 100


def test_lies_are_refused() -> None:
    pruner = single()
    pruner.prune()
    state = pruner.state_dict()
    lies: list[tuple[Any, str]] = [
        (lambda h: h["reports"].append(h["reports"][0]), "2 reports of 1 updates"),
        (lambda h: h["reports"][0].update(table=1), "names table 1 of 1"),
        (lambda h: h["reports"][0]["layers"].append(3), "3 rows, and its table 2"),
        (lambda h: h["reports"][0]["layers"].__setitem__(0, 10**6), "keeps 1000000 of 128"),
        (lambda h: h["reports"][0].update(achieved=float("nan")), "must have float there, got nan"),
        (lambda h: h["reports"][0].update(more=1), "must have"),
    ]
    for lie, words in lies:
        bad = copy.deepcopy(state)
        lie(bad["history"])
        fresh = single()
        with pytest.raises(CheckpointError, match=words):
            fresh.load_state_dict(bad)
        assert fresh.history == []
        assert fresh.masks == {}
