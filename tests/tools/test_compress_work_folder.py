"""The work folder returns the stored data or nothing. A changed byte is noticed, and the part is computed again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.compress import compress
from peraxis_tools.compress.run.types import FittedModule, ModuleReport
from peraxis_tools.compress.run.work_folder import WorkFolder
from tests.factories import component
from tests.tools.compress_pairs import FEW, llama_pair


def filled(folder: Path) -> WorkFolder:
    work = WorkFolder(folder / "out.pxd", "digest", resume=True)
    rng = np.random.default_rng(0)
    report = ModuleReport(error=0.1, error_none=0.2, error_same=0.3, note="")
    parts = (component(rng, pxd.Axis.ROW, (4, 6)),)
    work.save("part", [FittedModule(name="a", components=parts, report=report, full=None)])
    work.save_array("ids", np.arange(7))
    work.save_arrays("state", {"x": np.arange(5.0), "y": np.zeros((2, 0), np.int8)})
    work.save_text("text", {"key": "value"})
    return work


LOADS: dict[str, Callable[[WorkFolder], object]] = {
    "part.bin": lambda work: work.load("part"),
    "part.json": lambda work: work.load("part"),
    "ids.npy": lambda work: work.load_array("ids"),
    "state.npz": lambda work: work.load_arrays("state"),
    "text.text.json": lambda work: work.load_text("text"),
}


def test_what_was_stored_is_given_back(tmp_path: Path) -> None:
    work = filled(tmp_path)
    modules, ids, state, text = (LOADS[name](work) for name in ("part.bin", "ids.npy", "state.npz", "text.text.json"))
    assert isinstance(modules, list)
    assert modules[0].name == "a"
    assert np.array_equal(modules[0].components[0].mask, component(np.random.default_rng(0), pxd.Axis.ROW, (4, 6)).mask)
    assert np.array_equal(ids, np.arange(7))
    assert isinstance(state, dict)
    assert {name: array.shape for name, array in state.items()} == {"x": (5,), "y": (2, 0)}
    assert np.array_equal(state["x"], np.arange(5.0))
    assert text == {"key": "value"}


@pytest.mark.parametrize("file", LOADS)
def test_a_changed_byte_anywhere_in_a_file_is_noticed(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = filled(tmp_path)
    path = work.path / file
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 200))
    for spoilt in [
        *(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places),
        *(whole[:end] for end in places),
        whole + b"\0",
    ]:
        path.write_bytes(spoilt)
        assert LOADS[file](work) is None
    assert f"{path}: is damaged" in caplog.text
    path.write_bytes(whole)
    assert LOADS[file](work) is not None


def test_a_file_of_another_part_or_run_is_not_taken_for_this_one(tmp_path: Path) -> None:
    work = filled(tmp_path)
    work.save_text("other", {"key": "of another"})
    (work.path / "other.text.json").replace(work.path / "text.text.json")
    assert work.load_text("text") is None
    work.save_array("ids", np.arange(3))
    other = WorkFolder(tmp_path / "out.pxd", "another run", resume=True, is_main_process=False)
    assert other.load_array("ids") is None


def test_a_run_with_a_damaged_part_ends_in_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned, text = llama_pair(tmp_path)
    options = {"calibration": str(text), **FEW}
    compress(base, tuned, tmp_path / "whole.pxd", **options)
    output, work = tmp_path / "cut.pxd", tmp_path / "cut.pxd.peraxis-work"

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(base, tuned, output, progress=interrupt, **options)
    for part in ("embedding.bin", "block-00001.bin", "head.json"):
        data = bytearray((work / part).read_bytes())
        data[len(data) // 3] ^= 4
        (work / part).write_bytes(data)
    with caplog.at_level(logging.WARNING, "peraxis"):
        compress(base, tuned, output, **options)
    assert len([line for line in caplog.messages if "is damaged" in line]) == 3
    assert output.read_bytes() == (tmp_path / "whole.pxd").read_bytes()
    assert not work.exists()
