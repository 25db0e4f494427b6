"""Scoring a model on a task, before and after tuning. Definitions of every figure: docs/measures.md."""

from qlora_exp.evaluation.baselines import baselines
from qlora_exp.evaluation.context import max_positions
from qlora_exp.evaluation.forgetting import DocumentLoss, answer_losses, forgetting, text_losses
from qlora_exp.evaluation.goal import answer_goal
from qlora_exp.evaluation.oracle import check_answers
from qlora_exp.evaluation.per_item import ITEM_COLUMNS
from qlora_exp.evaluation.scoring import Evaluation, evaluate_model, limited

__all__ = [
    "ITEM_COLUMNS",
    "DocumentLoss",
    "Evaluation",
    "answer_goal",
    "answer_losses",
    "baselines",
    "check_answers",
    "evaluate_model",
    "forgetting",
    "limited",
    "max_positions",
    "text_losses",
]
