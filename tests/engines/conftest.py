"""Tests marked `vllm` run the real engine (`make test-vllm`). They skip visibly if vLLM is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engines.pair import make_chain, make_pair


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `vllm` if vLLM is absent."""
    if find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed; run `make test-vllm`"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base with biases and an untied lm_head, and three variants."""
    return make_pair(tmp_path_factory.mktemp("untied"), tied=False, seeds=(1, 2, 3))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base whose lm_head is its embedding, and two variants."""
    return make_pair(tmp_path_factory.mktemp("tied"), tied=True, seeds=(1, 2))


@pytest.fixture(scope="session")
def chain(untied: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two exact updates of the untied base, and the checkpoints that they produce."""
    return make_chain(tmp_path_factory.mktemp("chain"), Path(untied["base"]), steps=2)
