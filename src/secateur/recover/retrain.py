"""Where retraining starts from, on which learning rates, for how long. Values only: the loop acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from secateur.errors import RecipeError, check_choice, check_number, check_whole


class Start(NamedTuple):
    """A place in the training: before batch number ``batch`` of epoch number ``epoch``."""

    epoch: int
    batch: int = 0


class Recovery(Protocol):
    """How one round of retraining runs after a pruning step."""

    @property
    def rewinds_weights(self) -> bool:
        """Whether the surviving weights go back to what they were at the start."""
        ...

    def check(self, trained: int) -> None:
        """Refuse what a training of so many epochs cannot give, before any data is there."""
        ...

    def start(self, trained: int, steps_per_epoch: int) -> Start | None:
        """Where in the training the retraining starts, with that learning rate; ``None``: constant."""
        ...

    def length(self, trained: int, steps_per_epoch: int) -> int:
        """Epochs per round, the first perhaps not whole."""
        ...


@dataclass(frozen=True)
class Nothing:
    """No retraining: judge the masks alone."""

    @property
    def rewinds_weights(self) -> bool:
        """No."""
        return False

    def check(self, trained: int) -> None:
        """Nothing to refuse."""

    def start(self, trained: int, steps_per_epoch: int) -> Start | None:
        """No learning rate is needed."""
        return None

    def length(self, trained: int, steps_per_epoch: int) -> int:
        """None."""
        return 0


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
        if self.lr is not None:
            check_number("recover.lr", self.lr, above=True)

    @property
    def rewinds_weights(self) -> bool:
        """No: it goes on from the pruned weights."""
        return False

    def check(self, trained: int) -> None:
        """It asks nothing of the training."""

    def start(self, trained: int, steps_per_epoch: int) -> Start | None:
        """Constant learning rate."""
        return None

    def length(self, trained: int, steps_per_epoch: int) -> int:
        """As asked."""
        return self.epochs


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

    def check(self, trained: int) -> None:
        """Refuse to rewind further than the training goes back.

        Raises:
            RecipeError: When the network was trained for fewer epochs.
        """
        _check_reach(self.epochs, trained)

    def start(self, trained: int, steps_per_epoch: int) -> Start | None:
        """The epoch that lies ``epochs`` before the end of training."""
        self.check(trained)
        return Start(trained - self.epochs)

    def length(self, trained: int, steps_per_epoch: int) -> int:
        """As asked."""
        return self.epochs


@dataclass(frozen=True)
class WeightRewinding:
    r"""Put the survivors, the optimizer and the learning rate back to an earlier point of the training.

    .. math:: W \leftarrow M \odot W_k

    and train on from step :math:`k` to the end. Say the point by ``epochs``, counted back from the end of training, or
    by ``rewind_to``, counted from its beginning: ``rewind_to = 0`` is the original lottery ticket, which goes back to
    the initial weights; a few hundred steps or epochs later is late rewinding, which large networks need.

    The data order and every other random choice of what is trained again are repeated too, so a mask that keeps all
    weights reproduces the dense training bit for bit.

    Pitfalls:
        On large networks going back to the initial weights fails: go back to a point a little later.

    Args:
        epochs: Epochs per round; at most as many as the network was trained for.
        rewind_to: :math:`k`; give this or ``epochs``.
        unit: What ``rewind_to`` counts.

    References:
        Jonathan Frankle, Michael Carbin, The Lottery Ticket Hypothesis, 2019; Jonathan Frankle, Gintare Karolina
        Dziugaite, Daniel M. Roy, Michael Carbin, Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020 (late
        rewinding); Alex Renda, Jonathan Frankle, Michael Carbin, Comparing Rewinding and Fine-tuning in Neural Network
        Pruning, 2020 (``epochs``).
    """

    epochs: int | None = None
    rewind_to: int | None = None
    unit: Literal["epochs", "steps"] = "epochs"

    def __post_init__(self) -> None:
        check_choice("recover.unit", self.unit, get_args(Literal["epochs", "steps"]))
        if (self.epochs is None) == (self.rewind_to is None):
            raise RecipeError(
                f"weight_rewinding takes either recover.epochs (back from the end of training) or recover.rewind_to "
                f"(from its beginning; 0 = the initial weights), got epochs = {self.epochs}, "
                f"rewind_to = {self.rewind_to}"
            )
        if self.epochs is not None:
            _check_epochs(self.epochs)
            if self.unit != "epochs":
                raise RecipeError("recover.unit says what rewind_to counts; epochs are epochs: leave unit out")
        if self.rewind_to is not None:
            check_whole("recover.rewind_to (0 = the initial weights)", self.rewind_to, least=0)

    @property
    def rewinds_weights(self) -> bool:
        """Yes."""
        return True

    def check(self, trained: int) -> None:
        """Refuse to rewind to a point outside the training.

        Raises:
            RecipeError: When the network was trained for fewer epochs; steps are checked once the data is there.
        """
        if self.epochs is not None:
            _check_reach(self.epochs, trained)
        elif not trained:
            raise RecipeError(
                "weight_rewinding goes back to a point of this run's own training, and train.epochs = 0; train here, "
                "or use the recovery 'fine_tune'"
            )
        elif self.unit == "epochs":
            self._refuse_the_end(trained, "train.epochs")

    def start(self, trained: int, steps_per_epoch: int) -> Start | None:
        """The point to go back to.

        Raises:
            RecipeError: When the training ends before it.
        """
        self.check(trained)
        if self.rewind_to is None:
            return Start(trained - (self.epochs or 0))
        if self.unit == "epochs":
            return Start(self.rewind_to)
        self._refuse_the_end(trained * steps_per_epoch, f"{trained} epochs of {steps_per_epoch} steps")
        return Start(*divmod(self.rewind_to, steps_per_epoch))

    def length(self, trained: int, steps_per_epoch: int) -> int:
        """From the point to the end of training."""
        start = self.start(trained, steps_per_epoch)
        return trained if start is None else trained - start.epoch

    def _refuse_the_end(self, end: int, where: str) -> None:
        if self.rewind_to is not None and self.rewind_to >= end:
            raise RecipeError(
                f"recover.rewind_to = {self.rewind_to} {self.unit} leaves nothing to train again: the training has "
                f"{end} ({where}); ask for less"
            )


def _check_epochs(epochs: int) -> None:
    if epochs == 0:
        raise RecipeError("recover.epochs must be at least 1, got 0; to skip retraining use the name 'nothing'")
    check_whole("recover.epochs", epochs)


def _check_reach(epochs: int, trained: int) -> None:
    if epochs > trained:
        raise RecipeError(
            f"recover.epochs = {epochs} rewinds further than the {trained} epochs of train.epochs; ask for at most "
            f"{trained}, or use the recovery 'fine_tune'"
        )
