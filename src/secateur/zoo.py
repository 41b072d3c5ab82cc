"""The small networks and data that the demo and the tests use."""

from __future__ import annotations

from torch import nn

from secateur.errors import MissingExtraError
from secateur.pipeline.data import Data


def digits_cnn(width: int = 32) -> nn.Module:
    """Return a convolutional network for 8×8 digits: two convolutions with batch norm, two linear layers.

    Args:
        width: Filters of the first convolution; the second has twice as many.

    Returns:
        A model from (N, 1, 8, 8) to (N, 10).
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def digits() -> Data:
    """Return scikit-learn's 1797 handwritten digits, split 1347 / 450 by position.

    Returns:
        Images (N, 1, 8, 8) scaled to [0, 1], labels 0..9.

    Raises:
        MissingExtraError: When scikit-learn is not installed.
    """
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "demo") from None
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    # The file lists writers one after the other: the last quarter is by writers that the first has not seen.
    return Data(train=(images[:1347], labels[:1347]), test=(images[1347:], labels[1347:]))
