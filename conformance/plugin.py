"""A pytest plugin: one test for each case.

    pytest -p peraxis_conformance.plugin --pxd-adapter "node adapter.js" --pyargs peraxis_conformance.suite

`--pxd-corpus DIR` names the folder of the cases, as `--corpus` of `peraxis-conformance` does.

In a test suite of your own, `pytest_plugins = ["peraxis_conformance.plugin"]` offers the fixture `pxd_run`, which
takes a case and fails the test if the adapter does.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .cases import Case, Corpus, CorpusError
from .run import Adapter, laid_out, run_case

__all__ = ["pxd_adapter", "pxd_run", "pytest_addoption", "pytest_generate_tests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--pxd-adapter, --pxd-corpus, --pxd-case, --pxd-skip."""
    group = parser.getgroup("pxd", "conformance of PXD loaders")
    group.addoption("--pxd-adapter", help="the adapter's command (protocol v1)")
    group.addoption("--pxd-corpus", type=Path, metavar="DIR", help="the folder of the cases: `conformance` of a clone")
    group.addoption("--pxd-case", action="append", default=[], help="only cases whose id matches this glob")
    group.addoption("--pxd-skip", action="append", default=[], help="leave out cases whose id matches this glob")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with the argument `pxd_case` runs once for each case."""
    if "pxd_case" in metafunc.fixturenames:
        chosen = corpus_of(metafunc.config).select(
            metafunc.config.getoption("pxd_case"), metafunc.config.getoption("pxd_skip")
        )
        metafunc.parametrize("pxd_case", chosen, ids=lambda case: case.id)


def corpus_of(config: pytest.Config) -> Corpus:
    """The corpus of --pxd-corpus, or that beside the kit."""
    folder: Path | None = config.getoption("pxd_corpus")
    try:
        return Corpus(folder) if folder else Corpus()
    except CorpusError as error:
        raise pytest.UsageError(str(error).replace("--corpus", "--pxd-corpus")) from error


@pytest.fixture(scope="session")
def pxd_adapter(pytestconfig: pytest.Config) -> Iterator[Adapter]:
    """The adapter of --pxd-adapter; tests skip without one."""
    command = pytestconfig.getoption("pxd_adapter")
    if not command:
        pytest.skip("--pxd-adapter names no adapter")
    adapter = Adapter(shlex.split(command))
    yield adapter
    adapter.close()


@pytest.fixture(scope="session")
def pxd_run(pxd_adapter: Adapter, pytestconfig: pytest.Config) -> Iterator[Callable[[Case], None]]:
    """Run one case: passes, fails the test, or skips it."""
    with laid_out(pytestconfig.getoption("pxd_corpus")) as corpus:

        def run(case: Case) -> None:
            outcome = run_case(pxd_adapter, corpus, case)
            if outcome.status == "failed":
                pytest.fail(f"{case.id} (SPEC {case.clause}): {outcome.detail}", pytrace=False)
            if outcome.status != "passed":
                pytest.skip(outcome.detail)

        yield run
