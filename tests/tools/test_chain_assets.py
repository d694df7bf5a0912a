"""The small files of a chain: what apply writes is what the last state had, and compact does not change it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.chain import compact, update
from peraxis_tools.checkpoints.assets import asset_group
from peraxis_tools.compress import compress
from tests.factories import write_checkpoint

Files = Mapping[str, str]

CONFIG = {"config.json": '{"model_type": "llama", "vocab_size": 4}', "generation_config.json": '{"temperature": 1}'}
TOKENIZER = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": '{"bos_token": "<s>"}'}
STARTING: Files = CONFIG | TOKENIZER
# One file of a group changes; a file is added; one is removed; a whole group is added; all is as at the start again.
CHANGES: tuple[Files, ...] = (
    STARTING | {"generation_config.json": '{"temperature": 0.5}'},
    STARTING | {"generation_config.json": '{"temperature": 0.5}', "chat_template.jinja": "{{ messages }}"},
    CONFIG | {"tokenizer.json": '{"a": 2}'},
    CONFIG | {"tokenizer.json": '{"a": 2}', "processor_config.json": '{"size": 3}'},
    STARTING | {"processor_config.json": '{"size": 3}'},
)


def write_state(folder: Path, number: int, files: Files) -> Path:
    weights = np.full((2, 8), number, np.float32)
    write_checkpoint(folder, {"model.norm.weight": (weights, pxd.DType.F32)})
    for path in folder.glob("*.json"):
        path.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def small_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if asset_group(path.name) is not None}


@pytest.fixture
def states(tmp_path: Path) -> list[Path]:
    return [write_state(tmp_path / f"state-{i}", i, files) for i, files in enumerate((STARTING, *CHANGES))]


@pytest.mark.parametrize("consecutive", [True, False])
def test_a_chain_ends_with_the_small_files_of_its_last_state(
    states: list[Path], tmp_path: Path, consecutive: bool
) -> None:
    chain = tmp_path / "chain"
    chain.mkdir()
    files: list[Path] = []
    for i, state in enumerate(states[1:]):
        output = chain / f"{i}.pxd"
        if consecutive:
            update(states[i], state, output)
        else:
            update(states[0], state, output, after=files)
        files.append(output)
        apply(states[0], files, tmp_path / f"after-{i}")
        assert small_files(tmp_path / f"after-{i}") == small_files(state)
        compact(states[0], files, tmp_path / f"{i}-compact.pxd")
        apply(states[0], tmp_path / f"{i}-compact.pxd", tmp_path / f"compacted-{i}")
        assert small_files(tmp_path / f"compacted-{i}") == small_files(state)


GROWN = {"config.json": '{"model_type": "llama", "vocab_size": 8}', "generation_config.json": '{"temperature": 1}'}
SETTINGS = {"tokenizer_config.json": '{"bos_token": "<t>"}', "chat_template.jinja": "{{ messages }}"}


@pytest.mark.parametrize(
    "steps",
    [
        (STARTING, GROWN | TOKENIZER, GROWN | TOKENIZER),  # a padded table: the tokenizer is as before
        (STARTING, CONFIG | SETTINGS, CONFIG | SETTINGS),  # a tokenizer's settings without its vocabulary
        (CONFIG | SETTINGS, CONFIG | SETTINGS, GROWN | SETTINGS),
        (STARTING | {"merges.txt": "a b"}, GROWN | TOKENIZER, GROWN | SETTINGS),
    ],
)
def test_a_group_is_as_the_state_had_it_whatever_is_in_it(tmp_path: Path, steps: tuple[Files, ...]) -> None:
    folders = [write_state(tmp_path / f"state-{i}", i, files) for i, files in enumerate(steps)]
    files: list[Path] = []
    (tmp_path / "compact").mkdir()
    for i, (old, new) in enumerate(pairwise(folders)):
        files.append(tmp_path / f"{i}.pxd")
        update(old, new, files[-1])
        apply(folders[0], files, tmp_path / f"after-{i}")
        assert small_files(tmp_path / f"after-{i}") == small_files(new)
        compacted = tmp_path / "compact" / "c.pxd"
        compact(folders[0], files, compacted, overwrite=True)
        apply(folders[0], compacted, tmp_path / f"compacted-{i}")
        assert small_files(tmp_path / f"compacted-{i}") == small_files(new)


def test_an_update_has_the_files_of_the_groups_that_changed_and_no_others(states: list[Path], tmp_path: Path) -> None:
    def stored(old: int, new: int) -> set[str]:
        return of(states[old], states[new], f"{old}-{new}")

    def of(old: Path, new: Path, name: str) -> set[str]:
        (tmp_path / name).mkdir()
        update(old, new, tmp_path / name / "u.pxd")
        with pxd.open(tmp_path / name / "u.pxd") as file:
            return {asset.path for asset in file.manifest.assets}

    assert stored(0, 1) == set(CONFIG)
    assert stored(1, 2) == {*TOKENIZER, "chat_template.jinja"}
    assert stored(3, 4) == {"processor_config.json"}
    assert of(states[0], write_state(tmp_path / "as-before", 9, STARTING), "none") == set()


def test_a_compacted_chain_that_returns_has_no_small_files(states: list[Path], tmp_path: Path) -> None:
    back = write_state(tmp_path / "back", 9, STARTING)
    update(states[0], states[1], tmp_path / "1.pxd")
    update(states[0], back, tmp_path / "2.pxd", after=[tmp_path / "1.pxd"])
    compact(states[0], [tmp_path / "1.pxd", tmp_path / "2.pxd"], tmp_path / "c.pxd")
    with pxd.open(tmp_path / "2.pxd") as step, pxd.open(tmp_path / "c.pxd") as file:
        assert {asset.path for asset in step.manifest.assets} == set(CONFIG)
        assert not file.manifest.assets


def test_a_group_that_is_gone_is_told(states: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = write_state(tmp_path / "bare", 9, CONFIG)
    update(states[0], bare, tmp_path / "u.pxd")
    (told,) = (record.message for record in caplog.records if "removed in the new state" in record.message)
    assert told.startswith("tokenizer.json, tokenizer_config.json: ")


def test_a_lossless_delta_of_compress_takes_the_vocabulary_of_its_base_as_any_other(tmp_path: Path) -> None:
    base = write_state(tmp_path / "base", 1, STARTING)
    tuned = write_state(tmp_path / "tuned", 2, CONFIG | SETTINGS)
    compress(base, tuned, tmp_path / "d.pxd", exact=".*", force=True)
    apply(base, tmp_path / "d.pxd", tmp_path / "out")
    assert small_files(tmp_path / "out") == {**TOKENIZER, **CONFIG, **SETTINGS}
