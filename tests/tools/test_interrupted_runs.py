"""An interrupted run says what is left of it: an output that was not written, and work that is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from peraxis_tools import cli
from peraxis_tools.compress import compress
from peraxis_tools.compress.run.work_folder import WorkFolder
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.rules import claim_file, claim_folder
from peraxis_tools.process.command_line import Terminated
from peraxis_tools.process.threads import THREADS_MAX, use_threads
from tests.tools.compress_pairs import FEW, llama_pair

FIT: dict[str, Any] = dict(FEW)


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, lambda: Terminated(15)])
@pytest.mark.parametrize("claim", [claim_file, claim_folder])
def test_an_output_that_was_not_written_is_named(
    claim: Callable[..., AbstractContextManager[None]], stop: Callable[[], BaseException], tmp_path: Path
) -> None:
    error = stop()
    with pytest.raises(type(error)) as found, claim(tmp_path / "out", overwrite=False):
        raise error
    assert notes(found.value) == [f"{tmp_path / 'out'} was not written"]


@pytest.mark.parametrize("there", [False, True])
def test_an_output_that_was_written_before_the_interrupt_is_not_called_unwritten(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "out").write_text("before")
    (tmp_path / "new").write_text("after")

    def write() -> None:
        (tmp_path / "new").replace(tmp_path / "out")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as found, claim_file(tmp_path / "out", overwrite=True):
        write()
    assert not notes(found.value)


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (KeyboardInterrupt(), "error: interrupted; kept"),
        (Terminated(15), "error: ended by SIGTERM; kept"),
        (MemoryError(), "error: out of memory; use a machine with more memory, or smaller batches and samples; kept"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device; kept"),
    ],
)
def test_the_command_line_prints_what_is_left(
    stop: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        stop.add_note("kept")
        raise stop

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", "eval"])
    assert cli._exit_code() != 0
    assert " ".join(capsys.readouterr().err.split()) == line


def test_an_interrupted_fit_says_what_it_kept_and_the_next_run_that_it_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned, text = llama_pair(tmp_path)
    output = tmp_path / "delta.pxd"

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "write" or (step == "fit" and done == total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as found:
        compress(base, tuned, output, calibration=str(text), progress=interrupt, **FIT)
    kept = f"{output}.peraxis-work keeps 3 blocks; the same command continues"
    assert notes(found.value) == [kept, f"{output} was not written"]
    assert not any("continued" in message for message in caplog.messages)
    compress(base, tuned, output, calibration=str(text), **FIT)
    assert any("is continued after 3 blocks" in message and "--no-resume" in message for message in caplog.messages)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, lambda: Terminated(1)])
@pytest.mark.parametrize("stage", ["open", "generate"])
def test_an_interrupt_before_the_first_finished_part_leaves_no_work_folder(
    tmp_path: Path, stage: str, stop: Callable[[], BaseException]
) -> None:
    base, tuned, text = llama_pair(tmp_path)
    error, seen = stop(), []

    def interrupt(step: str, done: int, total: int) -> None:
        seen.append((tmp_path / "delta.pxd.peraxis-work").exists())
        if step == stage and seen[-1]:
            raise error

    with pytest.raises(type(error)) as found:
        compress(
            base,
            tuned,
            tmp_path / "delta.pxd",
            calibration=str(text),
            progress=interrupt,
            **FIT | {"generated_samples": 2},
        )
    assert seen[-1]  # it was there
    assert notes(found.value) == [f"{tmp_path / 'delta.pxd'} was not written"]
    assert not list(tmp_path.glob("delta.pxd*"))


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def interrupted(folder: Path, *, threads: int) -> dict[str, Any]:
    """The arguments of a fit with this many threads that was interrupted; its work folder is there."""
    base, tuned, text = llama_pair(folder)
    given = {"base": base, "fine_tuned": tuned, "output": folder / "delta.pxd", "calibration": str(text), **FIT}

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "write":
            raise KeyboardInterrupt

    torch.set_num_threads(threads)
    with pytest.raises(KeyboardInterrupt):
        compress(**given, progress=interrupt)
    return given


@pytest.mark.usefixtures("torch_threads")
def test_a_continued_fit_has_the_threads_of_the_interrupted_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another number of threads may change a last bit, and the file would be one that no undisturbed run gives."""
    given = interrupted(tmp_path, threads=2)
    seen: set[int] = set()
    torch.set_num_threads(1)
    compress(**given, progress=lambda *step: seen.add(torch.get_num_threads()) if step[0] == "write" else None)
    assert seen == {2}
    assert torch.get_num_threads() == 1
    assert "the interrupted run had 2 threads, so this one has as many" in caplog.text


@pytest.mark.usefixtures("torch_threads")
def test_a_fit_is_not_continued_with_another_number_of_threads_that_the_user_asked_for(tmp_path: Path) -> None:
    given = interrupted(tmp_path, threads=2)
    with use_threads(1), pytest.raises(ToolError, match=r"with 2 threads.*--threads 2, or begin anew with --no-resume"):
        compress(**given)
    assert (tmp_path / "delta.pxd.peraxis-work/block-00000.json").exists()
    with use_threads(2):
        assert compress(**given).bytes


@pytest.mark.usefixtures("torch_threads")
def test_a_folder_without_finished_work_gets_the_threads_of_the_run_that_fills_it(tmp_path: Path) -> None:
    for threads in (2, 3):
        work = WorkFolder(tmp_path / "out.pxd", "digest", resume=True, threads=threads)
        assert work.threads == threads
    work.save_array("ids", np.arange(3))
    assert WorkFolder(tmp_path / "out.pxd", "digest", resume=True, threads=4).threads == 3
    odd = ("0", "-1", "1e9", "true", "[1]", '"3"', str(THREADS_MAX + 1), "3000000000")
    for text in ("[]", '{"digest": "digest"}', *(f'{{"digest": "digest", "threads": {threads}}}' for threads in odd)):
        (work.path / "inputs.json").write_text(text)
        assert work.threads is None


@pytest.mark.parametrize("threads", ["0", "4097", "3000000000"])
@pytest.mark.parametrize("verb", [["compress", "base", "tuned"], ["eval", "base", "tuned", "d.pxd"]])
def test_a_number_of_threads_that_no_machine_has_is_refused_in_one_line(verb: list[str], threads: str) -> None:
    done = CliRunner().invoke(cli.cli, [*verb, "--threads", threads])
    assert done.exit_code == 2
    assert f"{threads} is not in the range 1<=x<={THREADS_MAX}" in " ".join(done.output.split())
