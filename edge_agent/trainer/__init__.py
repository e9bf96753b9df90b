"""Training on the device: numpy and ONNX Runtime, a quantised base that is only read, and an adapter that moves.

`trainer` opens a bundle, `step` runs it layer after layer, `round` is the loop over batches with its `optimizer` and
`schedule`, and `state` is what an interrupted round goes on from.
"""

from edge_agent.depth import HEAD_ONLY
from edge_agent.trainer.batch import BatchArrays
from edge_agent.trainer.optimizer import AdamW, Sgd
from edge_agent.trainer.round import Recipe, RoundOutcome, Rule, train_round
from edge_agent.trainer.schedule import Schedule
from edge_agent.trainer.state import TrainState
from edge_agent.trainer.step import StepResult
from edge_agent.trainer.trainer import Trainer

__all__ = [
    "HEAD_ONLY",
    "AdamW",
    "BatchArrays",
    "Recipe",
    "RoundOutcome",
    "Rule",
    "Schedule",
    "Sgd",
    "StepResult",
    "TrainState",
    "Trainer",
    "train_round",
]
