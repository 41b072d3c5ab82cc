"""A sparse training with checkpoints that dies at a step, by name, in this process or as a script."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur import Method, Target
from secateur.allocate import ErdosRenyiKernel
from secateur.checkpoint import load_tree, save_tree
from secateur.patterns import Channel
from secateur.scores import Random
from secateur.training import ACDC, SET, GraNet, RigL, SoftFilter, SparseTraining
from secateur.types import Dynamics

STEPS = 20
ERK = Method(target=Target("sparsity", 0.7), score=Random(0), allocate=ErdosRenyiKernel())
FILTERS = Method(target=Target("sparsity", 0.5), pattern=Channel(), exclude=("4",))
TRAININGS: dict[str, tuple[Method | Target, Dynamics]] = {
    "set": (ERK, SET(5, every=3, unit="steps")),
    "rigl": (ERK, RigL(end=18, every=2)),
    "granet": (Target("sparsity", 0.7), GraNet(18, every=3, unit="steps")),
    "ac_dc": (Target("sparsity", 0.7), ACDC(20, 3, 2, 2, 3, 4, "steps")),
    "soft_filter": (FILTERS, SoftFilter(end=18, every=3, unit="steps")),
}


def train(name: str, path: Path, dies_at: int, die: Callable[[], None]) -> None:
    """Train from the checkpoint if there is one; die between the optimizer's step and the masks' move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    trainer = SparseTraining(model, *TRAININGS[name], optimizer=optimizer, ema=ema)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "trainer": trainer}
    first = 0
    if path.exists():
        tree = load_tree(path)
        first = tree["step"]
        for key, part in parts.items():
            part.load_state_dict(tree[key])
    else:
        trainer.start()
    for step in range(first + 1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if step == dies_at:
            die()
        trainer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        if step % 2 == 0:
            save_tree(path, {"step": step, **{key: part.state_dict() for key, part in parts.items()}})


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))
