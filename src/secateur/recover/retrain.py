"""Where retraining starts from, on which learning rates, for how long. Values only: the loop acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from secateur.errors import RecipeError


class Recovery(Protocol):
    """How one round of retraining runs after a pruning step."""

    @property
    def epochs(self) -> int:
        """Epochs per round."""
        ...

    @property
    def rewinds_weights(self) -> bool:
        """Whether the surviving weights go back to what they were ``epochs`` before the end of training."""
        ...

    def training_epoch(self, trained: int) -> int | None:
        """Epoch of the original training whose learning rate the retraining starts with, or ``None``: constant."""
        ...


@dataclass(frozen=True)
class Nothing:
    """No retraining: judge the masks alone."""

    @property
    def epochs(self) -> int:
        """None."""
        return 0

    @property
    def rewinds_weights(self) -> bool:
        """No."""
        return False

    def training_epoch(self, trained: int) -> int | None:
        """No learning rate is needed."""
        return None


@dataclass(frozen=True)
class FineTune:
    """Train on at one small learning rate.

    Args:
        epochs: Epochs per round.
        lr: Learning rate; by default the last one of the training.

    References:
        Song Han, Jeff Pool, John Tran, William J. Dally, Learning both Weights and Connections for Efficient Neural
        Networks, 2015.
    """

    epochs: int
    lr: float | None = None

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)
        if self.lr is not None and not self.lr > 0:
            raise RecipeError(f"recover.lr must be > 0, got {self.lr}")

    @property
    def rewinds_weights(self) -> bool:
        """No: it goes on from the pruned weights."""
        return False

    def training_epoch(self, trained: int) -> int | None:
        """Constant learning rate."""
        return None


@dataclass(frozen=True)
class LearningRateRewinding:
    """Keep the weights and run the training's last ``epochs`` of learning rates again, in every round.

    Args:
        epochs: Epochs per round; at most as many as the network was trained for.

    References:
        Alex Renda, Jonathan Frankle, Michael Carbin, Comparing Rewinding and Fine-tuning in Neural Network Pruning,
        2020.
    """

    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    @property
    def rewinds_weights(self) -> bool:
        """No: only the learning rate goes back."""
        return False

    def training_epoch(self, trained: int) -> int | None:
        """The epoch that lies ``epochs`` before the end of training.

        Raises:
            RecipeError: When the network was trained for fewer epochs.
        """
        return _rewound(self.epochs, trained)


@dataclass(frozen=True)
class WeightRewinding:
    """Put the survivors, the optimizer and the learning rate back to ``epochs`` before the end of training.

    With ``epochs`` equal to the whole training this is the lottery ticket's rewinding to initialisation. The data
    order and every other random choice of those epochs are repeated too, so a mask that keeps all weights reproduces
    the dense training bit for bit.

    Args:
        epochs: Epochs per round; at most as many as the network was trained for.

    References:
        Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael Carbin, Stabilizing the Lottery Ticket
        Hypothesis, 2019; Alex Renda, Jonathan Frankle, Michael Carbin, Comparing Rewinding and Fine-tuning in Neural
        Network Pruning, 2020.
    """

    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    @property
    def rewinds_weights(self) -> bool:
        """Yes."""
        return True

    def training_epoch(self, trained: int) -> int | None:
        """The epoch that lies ``epochs`` before the end of training.

        Raises:
            RecipeError: When the network was trained for fewer epochs.
        """
        return _rewound(self.epochs, trained)


def _check_epochs(epochs: int) -> None:
    if epochs < 1:
        raise RecipeError(f"recover.epochs must be at least 1, got {epochs}; to skip retraining use the name 'nothing'")


def _rewound(epochs: int, trained: int) -> int:
    if epochs > trained:
        raise RecipeError(
            f"recover.epochs = {epochs} rewinds further than the {trained} epochs of train.epochs; ask for at most "
            f"{trained}, or use the recovery 'fine_tune'"
        )
    return trained - epochs
