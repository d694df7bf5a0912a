"""The loaders that the project ships pass the kit. `make conformance` runs the slow cases that are left out here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from peraxis_conformance import Adapter, Corpus, laid_out, run_cases
from peraxis_conformance.report import badge

from tests.conformance.helpers import KIT, SLOW, compiled_loader, node_loader, reference_loader


@pytest.fixture(scope="module")
def corpus() -> Iterator[Corpus]:
    with laid_out() as made:
        yield made


def passes(command: list[str], corpus: Corpus, skip: tuple[str, ...]) -> None:
    summary = run_cases(Adapter(command), corpus, corpus.select(skip=skip), jobs=2)
    print(f"\n{summary.caps.implementation}: {badge(summary)}")
    assert [(o.case.id, o.detail) for o in summary.outcomes if o.status == "failed"] == []
    assert summary.passed


def test_the_reference_library_passes_every_case(corpus: Corpus) -> None:
    passes(reference_loader(), corpus, SLOW)


def test_the_loader_in_c_passes_under_sanitizers(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.getbasetemp()
    passes(
        compiled_loader(folder),
        corpus,
        (*SLOW, "cut/*", "invalid/schema-*", "invalid/name-*", "apply/sign-*", "hostile/limit-*"),
    )


def test_the_loader_in_c_stays_short() -> None:
    lines = (KIT / "loaders" / "c" / "pxd.c").read_text().splitlines()
    assert len(lines) < 1060
    assert max(map(len, lines)) <= 120


def test_the_loader_in_javascript_passes(corpus: Corpus) -> None:
    passes(node_loader(), corpus, SLOW)
