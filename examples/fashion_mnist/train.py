"""Train, prune, retrain: the whole of it in one plain loop. `python examples/fashion_mnist/train.py --help`."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from data import load
from models import NETS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from secateur import Method, Pruner, SecateurError, Target
from secateur.schedules import iterative


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    train: tuple[Tensor, Tensor],
    *,
    epochs: int,
    lr: float,
    generator: torch.Generator,
    batch_size: int = 128,
    pruner: Pruner | None = None,
) -> None:
    """Train for some epochs with the learning rate falling in a straight line from ``lr`` to zero.

    Pass ``pruner`` only when its schedule counts steps; one that prunes in rounds is called between the rounds, and
    its masks hold during training all the same.
    """
    model.train()
    images, labels = train
    steps_per_epoch = len(images) // batch_size
    total, step = epochs * steps_per_epoch, 0
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, steps_per_epoch * batch_size, batch_size):
            batch = order[start : start + batch_size]
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / total)
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if pruner is not None:
                pruner.step()
            step += 1


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return accuracy in percent, and mean loss in nats."""
    model.eval()
    outputs = torch.cat([model(part) for part in torch.split(images, 1000)])
    correct = (outputs.argmax(1) == labels).double().mean()
    return 100 * float(correct), float(F.cross_entropy(outputs, labels))


def main() -> None:
    """Train a network densely, then prune it in rounds, retraining after each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="lenet_300_100")
    parser.add_argument("--ratio", type=float, default=12, help="how many times fewer parameters (default 12)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of pruning and retraining (default 5)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of dense training (default 10)")
    parser.add_argument("--retrain-epochs", type=int, default=3, help="epochs after each round (default 3)")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="folder with the four files (default: see README.md)")
    parser.add_argument("--download", action="store_true", help="fetch the data set if it is not on this machine")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = load(args.data, download=args.download)
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    generator = torch.Generator().manual_seed(args.seed)
    model: nn.Module = NETS[args.net]()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions twice as fast on a CPU
    optimizer = SGD(model.parameters(), momentum=0.9, weight_decay=5e-4)

    start = time.perf_counter()
    fit(model, optimizer, train, epochs=args.epochs, lr=args.lr, generator=generator)
    print(f"dense:   accuracy {evaluate(model, *test)[0]:.2f} %, {time.perf_counter() - start:.0f} s")

    method = Method(target=Target("compression_ratio", args.ratio), schedule=iterative(rounds=args.rounds))
    pruner = Pruner(model, method, optimizer=optimizer)
    while not pruner.finished:
        report = pruner.prune()  # removes the smallest weights; they stay zero from here on
        fit(model, optimizer, train, epochs=args.retrain_epochs, lr=args.lr, generator=generator)
        print(f"{report.achieved:5.1f} x: accuracy {evaluate(model, *test)[0]:.2f} %")

    for row in pruner.history[-1].layers:
        print(f"  {row.name:12} kept {row.kept:7,} of {row.total:7,} ({row.kept / row.total:.1%})")


if __name__ == "__main__":
    try:
        main()
    except SecateurError as error:
        sys.exit(f"error: {error}")
