"""What happens after a pruning step: retraining, rewinding, distillation, batch-norm repair."""

from secateur.recover.batch_norm import Moved, reestimate_bn_, rematch_bn_
from secateur.recover.distill import DISTILLATIONS, Distillation, Outputs, SoftTargets, distillation_loss
from secateur.recover.retrain import FineTune, LearningRateRewinding, Nothing, WeightRewinding
from secateur.recover.rewind import Rewind
from secateur.registry import Registry

RECOVERIES = Registry(
    "recover",
    {
        "nothing": Nothing,
        "fine_tune": FineTune,
        "learning_rate_rewinding": LearningRateRewinding,
        "weight_rewinding": WeightRewinding,
    },
)

__all__ = [
    "DISTILLATIONS",
    "RECOVERIES",
    "Distillation",
    "FineTune",
    "LearningRateRewinding",
    "Moved",
    "Nothing",
    "Outputs",
    "Rewind",
    "SoftTargets",
    "WeightRewinding",
    "distillation_loss",
    "reestimate_bn_",
    "rematch_bn_",
]
