"""No wrong loader survives the kit: every switch of loaders/wrong makes at least one case fail.

The wrong loaders answer in this process, so that there can be many of them. The runner, the corpus and the verdicts are
those of the kit. A few loaders run as commands to show that this makes no difference.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
from peraxis_conformance import Adapter, Corpus, laid_out, run_cases
from peraxis_conformance.run import Summary

from tests.conformance.helpers import KIT, SLOW, wrong_loader
from tests.conformance.in_process import InProcess

sys.path.insert(0, str(KIT / "loaders" / "wrong"))
try:
    small = importlib.import_module("adapter")
finally:
    sys.path.pop(0)
SWITCHES: dict[str, str] = small.SWITCHES


@pytest.fixture(scope="module")
def corpus() -> Iterator[Corpus]:
    with laid_out() as made:
        yield made


def until_it_fails(adapter: Adapter, corpus: Corpus, clause: str) -> Summary:
    """Run first the cases of the clause that the switch breaks, then those that apply. Stop at the first failure."""
    cases = corpus.select(skip=SLOW)
    ordered = sorted(cases, key=lambda case: (case.clause != clause, not case.id.startswith("apply/")))
    return run_cases(adapter, corpus, ordered, stop_at_first=True)


def test_there_are_many_ways_to_be_wrong() -> None:
    print(f"\n{len(SWITCHES)} wrong loaders")
    assert len(SWITCHES) >= 40


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_kit_fails_a_wrong_loader(corpus: Corpus, switch: str) -> None:
    summary = until_it_fails(InProcess(small, switch), corpus, SWITCHES[switch])
    assert summary.count("failed") == 1, f"{switch} passes every case"
    assert not summary.passed


@pytest.mark.parametrize("switch", ["most-significant-bit-first", "trailing-bytes", "partial-match"])
def test_the_kit_fails_a_wrong_loader_that_is_a_command(corpus: Corpus, switch: str) -> None:
    summary = until_it_fails(Adapter(wrong_loader(switch)), corpus, SWITCHES[switch])
    assert summary.count("failed") == 1, f"{switch} passes every case"


def test_the_kit_passes_the_same_loader_when_it_is_right(corpus: Corpus) -> None:
    """This shows that the failures above are not failures of the small reader itself."""
    summary = run_cases(InProcess(small), corpus, corpus.select(skip=SLOW))
    assert [(o.case.id, o.detail) for o in summary.outcomes if o.status == "failed"] == []
    assert summary.passed
