"""What all tests share: the shared data folder, and quiet libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before any test imports them: no hub, no tokenizer threads, one thread a process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("default")

_SHARED = Path(os.environ.get("PERAXIS_SHARED", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that ask for it skip where it is absent."""
    if not (_SHARED / "pairs").is_dir():
        pytest.skip("no shared data folder (set PERAXIS_SHARED)")
    return _SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what reads the shared folder, so that `-m realdata` and `-m 'not realdata'` hold what they say."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.realdata)
