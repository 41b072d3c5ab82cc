"""A folder of a user's own: a network, data and a recipe, all tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from secateur.cli import main

NETWORK = """
import torch
from torch import nn
from torch.utils.data import Dataset
from secateur import Data


def make(width=8):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(4, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * width, 3),
    )


def needs(size):
    return make(size)


def wrong():
    return 3


number = 3


def samples(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, 4, 4, generator=generator)
    return x, x.sum((2, 3)).argmax(1).clamp_max(2)


class Untouchable(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        raise AssertionError("the test split was read")


def data():
    return Data(train=samples(60), test=samples(30))


def guarded():
    return Data(train=samples(60), test=Untouchable())


def validated():
    return Data(train=samples(60), test=Untouchable(), validation=samples(20))
"""

RECIPE = """
name = "tiny"
export = ["safetensors"]

[model]
factory = "net.py:make"
weights = "dense.safetensors"

[data]
factory = "net.py:data"
batch_size = 20

[prune]
target = { sparsity = 0.75 }
"""


@dataclass(frozen=True)
class Answer:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Answer]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``net.py``, ``recipe.toml`` and trained weights."""
    from secateur.checkpoint import save_model
    from secateur.pipeline.factories import make_model

    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_model(tmp_path / "dense.safetensors", make_model("net.py:make", {}, base=tmp_path))
    return tmp_path


@pytest.fixture
def finished(workspace: Path) -> Path:
    """A run directory as ``secateur run`` leaves it, without the time that a run takes."""
    from secateur.checkpoint import load_weights, save_masks, save_model
    from secateur.pipeline.factories import make_model
    from secateur.pruner import prune_
    from secateur.recipe import load

    recipe = load(workspace / "recipe.toml")
    model = make_model(recipe.model.factory, {}, base=workspace)
    load_weights(model, workspace / "dense.safetensors")
    folder = workspace / "runs" / "tiny"
    folder.mkdir(parents=True)
    save_model(folder / "dense.safetensors", model)
    pruned = prune_(model, recipe.prune.build())
    save_model(folder / "model.safetensors", model, masks=pruned.masks)
    save_masks(folder / "masks.safetensors", pruned.masks)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command line in this process, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv: object) -> Answer:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        printed = capsys.readouterr()
        return Answer(code, printed.out, printed.err)

    return run


@pytest.fixture
def python() -> Callable[[str], Answer]:
    """Run Python code in a process of its own."""

    def run(code: str) -> Answer:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "80"},
            timeout=60,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    return run
