"""Mutants of two loaders: each comparison, bound, constant and connective is changed, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from peraxis_conformance import Adapter, Case, Corpus, run_cases

__all__ = ["Mutant", "Teeth"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change. name: the file, the line and the change. source: the whole mutated file."""

    name: str
    file: str
    source: str


class Teeth:
    """Cases in the order in which they are tried; one that fails a mutant moves to the front.

    seconds: the time for all of them, in this process. flags: the compiler's.
    """

    def __init__(self, cases: Sequence[Case], seconds: int, flags: Sequence[str]) -> None:
        self.cases, self.seconds, self.flags = list(cases), seconds, tuple(flags)

    def passed(self, adapter: Adapter, corpus: Corpus) -> bool:
        """Whether every case passes."""
        summary = run_cases(adapter, corpus, self.cases, jobs=1, stop_at_first=True)
        for outcome in summary.outcomes:
            if outcome.status == "failed":
                self.cases.remove(outcome.case)
                self.cases.insert(0, outcome.case)
        return summary.passed
