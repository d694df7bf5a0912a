"""The verb eval: the fidelity of a delta to its fine-tuned checkpoint, on text and on tasks."""

from peraxis_tools.evaluate.run import EvaluationDType, evaluate, worst_kl
from peraxis_tools.evaluate.types import (
    CANDIDATES,
    DomainResult,
    EvaluateResult,
    Fidelity,
    TaskResult,
    recovered_fraction,
)

__all__ = [
    "CANDIDATES",
    "EvaluationDType",
    "DomainResult",
    "EvaluateResult",
    "Fidelity",
    "TaskResult",
    "evaluate",
    "recovered_fraction",
    "worst_kl",
]
