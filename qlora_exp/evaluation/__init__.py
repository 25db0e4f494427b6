"""Scoring a model on a task, before and after tuning. Definitions of every figure: docs/measures.md."""

from qlora_exp.evaluation.baselines import baselines
from qlora_exp.evaluation.forgetting import forgetting, nats_per_byte_by_document
from qlora_exp.evaluation.goal import answer_goal
from qlora_exp.evaluation.scoring import Evaluation, evaluate_model

__all__ = [
    "Evaluation",
    "answer_goal",
    "baselines",
    "evaluate_model",
    "forgetting",
    "nats_per_byte_by_document",
]
