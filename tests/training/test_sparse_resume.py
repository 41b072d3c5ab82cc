"""Killed at any instant, a sparse training resumes from its last checkpoint and ends where it would have ended."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.checkpoint import load_tree

from . import resumed


class DiedError(Exception):
    """Stands for the end of a process."""


def die() -> None:
    raise DiedError


def same(one: object, two: object, at: str) -> None:
    if isinstance(one, dict) and isinstance(two, dict):
        assert one.keys() == two.keys(), at
        for key, value in one.items():
            same(value, two[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), at
        for i, pair in enumerate(zip(one, two, strict=True)):
            same(*pair, f"{at}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), at
    else:
        assert one == two, at


@pytest.mark.parametrize("dies_at", [1, 4, 9, 12, 19])
@pytest.mark.parametrize("name", resumed.TRAININGS)
def test_interrupted_and_resumed(name: str, dies_at: int, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    resumed.train(name, whole, 0, die)
    with pytest.raises(DiedError):
        resumed.train(name, broken, dies_at, die)
    resumed.train(name, broken, 0, die)
    same(load_tree(whole), load_tree(broken), name)
    assert load_tree(whole)["trainer"]["masks"]


def test_killed_and_resumed(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    resumed.train("rigl", whole, 0, die)
    command = [sys.executable, resumed.__file__, "rigl", str(broken), "11"]
    assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
    assert broken.exists()
    resumed.train("rigl", broken, 0, die)
    same(load_tree(whole), load_tree(broken), "rigl")
