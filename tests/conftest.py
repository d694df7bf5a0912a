"""Fixtures of all tests: the shared data folder, quiet libraries, and a restored logger."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before any test imports the libraries: no hub, no tokenizer threads, one thread per process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with an ignored SIGINT, which the programs that tests interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("default")

_SHARED = Path(os.environ.get("PERAXIS_SHARED", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Restore the level and the handlers of the program's logger, which a command changes."""
    logger = logging.getLogger("peraxis")
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data. Tests that use it skip if it is absent."""
    if not (_SHARED / "pairs").is_dir():
        pytest.skip("no shared data folder (set PERAXIS_SHARED)")
    return _SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the shared folder as `realdata`."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.realdata)
