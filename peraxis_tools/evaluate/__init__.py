"""How close a delta comes to the fine-tuned checkpoint that it stands for: on text, and on tasks."""

from peraxis_tools.evaluate.run import evaluate, worst_kl
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
    "DomainResult",
    "EvaluateResult",
    "Fidelity",
    "TaskResult",
    "evaluate",
    "recovered_fraction",
    "worst_kl",
]
