"""A pytest plugin: one test for each case.

    pytest -p peraxis_conformance.plugin --pxd-adapter "node adapter.js" --pyargs peraxis_conformance.suite

In a test suite of your own, `pytest_plugins = ["peraxis_conformance.plugin"]` offers the fixture `pxd_run`, which
takes a case and fails the test if the adapter does.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

import pytest

from .cases import Case, Corpus
from .run import Adapter, laid_out, run_case

__all__ = ["pxd_adapter", "pxd_run", "pytest_addoption", "pytest_generate_tests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--pxd-adapter, --pxd-case, --pxd-skip."""
    group = parser.getgroup("pxd", "conformance of PXD loaders")
    group.addoption("--pxd-adapter", help="the adapter's command (protocol v1)")
    group.addoption("--pxd-case", action="append", default=[], help="only cases whose id matches this glob")
    group.addoption("--pxd-skip", action="append", default=[], help="leave out cases whose id matches this glob")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with the argument `pxd_case` runs once for each case."""
    if "pxd_case" in metafunc.fixturenames:
        chosen = Corpus().select(metafunc.config.getoption("pxd_case"), metafunc.config.getoption("pxd_skip"))
        metafunc.parametrize("pxd_case", chosen, ids=lambda case: case.id)


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
def pxd_run(pxd_adapter: Adapter) -> Iterator[Callable[[Case], None]]:
    """Run one case: passes, fails the test, or skips it."""
    with laid_out() as corpus:

        def run(case: Case) -> None:
            outcome = run_case(pxd_adapter, corpus, case)
            if outcome.status == "failed":
                pytest.fail(f"{case.id} (SPEC {case.clause}): {outcome.detail}", pytrace=False)
            if outcome.status != "passed":
                pytest.skip(outcome.detail)

        yield run
