"""After each of a hundred kills of verbs that write, no output is partial and the next run leaves no files behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tools.kill_driver import chosen_steps
from tests.tools.output_cases import FILE_VERBS, FOLDER_VERBS

KILLS = 4  # for each verb and each earlier state of its output
VERBS = [*FILE_VERBS, *FOLDER_VERBS]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Verb -> earlier state of its output -> kills, steps and faults."""
    folder = tmp_path_factory.mktemp("kills") / "work"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.tools.kill_driver", str(folder), str(KILLS), *VERBS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_killed_at_any_step_leaves_its_output_whole_or_as_it_was_and_the_next_run_leaves_nothing(
    verb: str, found: dict[str, dict[str, dict[str, Any]]]
) -> None:
    for state, result in found[verb].items():
        assert result["wrong"] == [], state
        assert result["kills"] >= KILLS - 1


def test_there_are_a_hundred_kills(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    assert sum(result["kills"] for states in found.values() for result in states.values()) >= 100


def test_the_steps_that_are_chosen_reach_to_the_last_one() -> None:
    assert chosen_steps(5, 0) == [1, 2, 3, 4, 5]
    assert chosen_steps(40, 4) == [1, 16, 35, 40]
    assert chosen_steps(3, 4) == [1, 2, 3]
