"""Outputs of every verb: files that are never replaced, files that --overwrite replaces, devices, parallel runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.cli import main
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs import folders
from peraxis_tools.outputs.folders import MARKER, atomic_folder, earlier_output, write_marker
from peraxis_tools.outputs.rules import claim_file, claim_files, claim_folder
from tests.factories import large_pair
from tests.tools.output_cases import FILE_VERBS, FOLDER_VERBS, INPUTS, make_inputs, snapshot

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, line: str, **names: object) -> int:
    arguments = [word.format(**names) for word in line.split()]
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", FILE_VERBS)
def test_a_file_that_exists_is_replaced_with_overwrite_alone(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, name = FILE_VERBS[verb]
    (folder / name).write_text("precious")
    assert run(monkeypatch, line, out=name) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / name).read_text() == "precious"
    assert run(monkeypatch, f"{line} --overwrite", out=name) == 0
    assert (folder / name).read_bytes() != b"precious"
    assert [path.name for path in folder.iterdir() if "peraxis" in path.name] == []


@pytest.mark.parametrize("verb", FILE_VERBS)
def test_no_input_is_replaced_by_an_output_file(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, name = FILE_VERBS[verb]
    for place, target in enumerate(INPUTS[verb]):
        os.symlink(target, folder / f"link-{place}-{name}")
        os.link(folder / target, folder / f"hard-{place}-{name}")
    links = sorted(path.name for path in folder.iterdir() if path.name.startswith(("link-", "hard-")))
    before = snapshot(folder)
    for target in [*INPUTS[verb], *(f"./base/../{target}" for target in INPUTS[verb]), *links]:
        assert run(monkeypatch, f"{line} --overwrite", out=target) == 2, target
        assert "input" in capsys.readouterr().err, target
    assert snapshot(folder) == before


@pytest.mark.parametrize("verb", [verb for verb in FILE_VERBS if verb != "plot"])
def test_a_device_is_written_into(verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.stat("/dev/null")
    assert run(monkeypatch, FILE_VERBS[verb][0], out="/dev/null") == 0
    assert os.path.samestat(before, os.stat("/dev/null"))


def test_a_report_goes_to_standard_output_by_its_name(folder: Path) -> None:
    command = [sys.executable, "-m", "peraxis_tools", "verify", "a.pxd", "--format", "json", "-o", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert json.loads(done.stdout)["schema"] == "peraxis.verify/1"


@pytest.mark.parametrize("name", ["", "no/such/folder/new", "base", "n" * 256])
@pytest.mark.parametrize("verb", ["compress", "merge", "html"])
def test_an_output_that_cannot_be_is_refused_in_one_line_that_names_it(
    verb: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", *FILE_VERBS[verb][0].format(out="\0").split(" ")])
    sys.argv = [word.replace("\0", name) for word in sys.argv]
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert (caught.value.code, said.count("\n")) == (2, 1)
    assert (name or "empty").rpartition("/")[0] in said


def test_two_outputs_of_one_run_are_two_files(folder: Path) -> None:
    (folder / "sub").mkdir()
    with pytest.raises(ToolError, match="two outputs"), claim_files(["r.json", "sub/../r.json"], overwrite=True):
        pass


def test_an_input_that_is_a_blob_of_a_hub_cache_is_an_input_by_its_link_too(folder: Path) -> None:
    (folder / "snapshot").mkdir()
    os.symlink("../base/model.safetensors", folder / "snapshot" / "model.safetensors")
    with (
        pytest.raises(ToolError, match="input"),
        claim_file("base/model.safetensors", overwrite=True, inputs=["snapshot"]),
    ):
        pass


def test_a_delta_may_lie_and_be_replaced_in_the_folder_of_its_checkpoint(folder: Path) -> None:
    (folder / "tuned" / "delta.pxd").write_bytes(b"earlier")
    with claim_file("tuned/delta.pxd", overwrite=True, inputs=["base", "tuned"]):
        pass


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", FOLDER_VERBS)
def test_of_an_earlier_output_its_own_files_are_replaced_and_the_rest_stays(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = FOLDER_VERBS[verb]
    assert run(monkeypatch, line, out="out") == 0
    made = snapshot(folder / "out")
    (folder / "out" / "notes.txt").write_text("mine")
    (folder / "out" / "logs" / "deep").mkdir(parents=True)
    (folder / "out" / "logs" / "deep" / "run.log").write_text("mine too")
    os.symlink("notes.txt", folder / "out" / "link")
    spoilt = next(name for name in made if name.endswith((".safetensors", ".pxd")))
    (folder / "out" / spoilt).write_bytes(b"spoilt")
    assert run(monkeypatch, line, out="out") == 2
    assert run(monkeypatch, f"{line} --overwrite", out="out") == 0
    assert snapshot(folder / "out") == {**made, "notes.txt": b"mine", "logs/deep/run.log": b"mine too", "link": b"mine"}
    assert os.readlink(folder / "out" / "link") == "notes.txt"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".peraxis")] == []


@pytest.mark.parametrize("verb", FOLDER_VERBS)
def test_a_folder_that_is_no_earlier_output_is_never_replaced(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "my.py").write_text("precious")
    before = snapshot(folder)
    for more in ("", "--overwrite"):
        assert run(monkeypatch, f"{FOLDER_VERBS[verb]} {more}", out="out") == 2
    assert "my.py" in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.mark.parametrize("verb", FOLDER_VERBS)
def test_a_folder_that_holds_an_input_is_never_replaced(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # It looks like an earlier output, so that the other rule does not apply.
    folders.write_marker(folder, ["config.json"])
    before = snapshot(folder)
    for target in (str(folder), f"../{folder.name}", "."):
        assert run(monkeypatch, f"{FOLDER_VERBS[verb]} --overwrite", out=target) == 2
        assert "contains the input" in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.mark.parametrize("verb", [verb for verb in FOLDER_VERBS if verb != "publish"])
def test_a_repository_is_replaced_by_publish_alone(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its card is no list of its files, so another verb would leave some of them beside its own."""
    assert run(monkeypatch, FOLDER_VERBS["publish"], out="out") == 0
    before = snapshot(folder)
    assert run(monkeypatch, f"{FOLDER_VERBS[verb]} --overwrite", out="out") == 2
    assert "no list of an earlier output" in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.mark.parametrize("second", ["publish", "apply", "split"])
@pytest.mark.parametrize("first", ["apply", "split"])
def test_an_output_of_another_verb_is_replaced_whole(
    first: str, second: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, FOLDER_VERBS[first], out="out") == 0
    assert run(monkeypatch, f"{FOLDER_VERBS[second]} --overwrite", out="out") == 0
    assert run(monkeypatch, FOLDER_VERBS[second], out="alone") == 0
    assert snapshot(folder / "out") == snapshot(folder / "alone")


def test_apply_to_the_current_folder_fills_it_where_it_is_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    inode = os.stat(".").st_ino
    apply("../base", "../a.pxd", ".")
    assert os.stat(folder / "here").st_ino == inode
    apply("../base", "../a.pxd", "../there")
    assert snapshot(folder / "here") == snapshot(folder / "there")
    with pytest.raises(ToolError, match="--overwrite"):
        apply("../base", "../a.pxd", ".")
    apply("../base", "../a.pxd", ".", overwrite=True)
    assert snapshot(folder / "here") == snapshot(folder / "there")
    (folder / "here" / "notes").write_text("mine")
    with pytest.raises(ToolError, match="cannot be moved"):
        apply("../base", "../a.pxd", ".", overwrite=True)


def test_files_of_an_earlier_output_that_the_new_one_has_not_are_gone(folder: Path) -> None:
    base, delta = large_pair(folder)
    apply(base, delta, "out", shard_size="1MB")
    assert (folder / "out" / "model.safetensors.index.json").exists()
    apply(base, delta, "out", overwrite=True)
    assert sorted(os.listdir(folder / "out")) == [MARKER, "config.json", "model.safetensors"]


def test_without_a_system_call_that_exchanges_names_the_outcome_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    apply("base", "a.pxd", "out")
    (folder / "out" / "notes").write_text("mine")
    before = snapshot(folder / "out")
    apply("base", "a.pxd", "out", overwrite=True)
    assert snapshot(folder / "out") == before
    # After a kill between the two renames the next run restores the old folder first.
    os.rename(folder / "out", folders._aside(folder / "out"))
    with pytest.raises(KeyError), atomic_folder(folder / "out", overwrite=True):
        raise KeyError
    assert snapshot(folder / "out") == before
    assert [name for name in os.listdir(folder) if name.startswith(".peraxis")] == []


def test_a_list_that_is_no_list_is_none(tmp_path: Path) -> None:
    for text in ("", "[" * 10_000, "{}", '{"schema": "peraxis.output/1", "files": [1]}', "[]", '{"schema": 1}'):
        (tmp_path / MARKER).write_text(text)
        assert folders.earlier_output(tmp_path) is None


def test_no_folder_is_made_above_an_output(folder: Path) -> None:
    with pytest.raises(ToolError, match="x/y: no such folder; make it first"):
        apply("base", "a.pxd", "x/y/z")
    assert not (folder / "x").exists()


# --- two runs ----------------------------------------------------------------------------------------------------


@contextmanager
def another_run(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that prints a line in the middle of the code and stays there until the end of the block."""
    lines = ["import sys", "from peraxis_tools.outputs.rules import *", f"with {code}:", " print('in', flush=True)"]
    program = "\n".join([*lines, " sys.stdin.read()"])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    try:
        yield process
    finally:
        process.communicate()


def test_of_two_runs_to_one_output_one_wins_and_the_other_says_so(folder: Path) -> None:
    with another_run("claim_file('out.pxd', overwrite=True)") as process:
        told = f"another run \\(process {process.pid}\\) is writing it"
        with pytest.raises(ToolError, match=told), claim_file(folder / "out.pxd", overwrite=True):
            pass
        with claim_file("other.pxd", overwrite=True):
            pass
    with claim_file("out.pxd", overwrite=True):
        pass
    late = claim_folder("./base/../out", overwrite=True)
    with (
        another_run("claim_folder('out', overwrite=True)"),
        pytest.raises(ToolError, match="is writing it"),
        late,
    ):
        pass
    assert [name for name in os.listdir(folder) if name.startswith(".peraxis")] == []


def test_the_lock_of_a_killed_run_binds_nobody(folder: Path) -> None:
    with another_run("claim_file('out.pxd', overwrite=True)") as process:
        process.kill()
        process.wait()
    assert [name for name in os.listdir(folder) if name.startswith(".peraxis")] != []
    with claim_file("out.pxd", overwrite=True):
        pass
    assert [name for name in os.listdir(folder) if name.startswith(".peraxis")] == []


def test_of_many_runs_at_once_the_output_is_whole_and_one_of_them_made_it(folder: Path) -> None:
    outcomes: list[Any] = []

    def one() -> None:
        try:
            outcomes.append(apply("base", "a.pxd", "out").content_id)
        except ToolError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([outcome for outcome in outcomes if isinstance(outcome, str)]) == 1
    with pxd.Safetensors.open("out") as found:
        assert len(found) == 3


@pytest.mark.parametrize("name", ["/abs/thesis.txt", "../thesis.txt", "a/../../thesis.txt", "", ".", "a\0b"])
def test_a_list_with_names_outside_its_folder_is_no_earlier_output(tmp_path: Path, name: str) -> None:
    for finished in (True, False):
        write_marker(tmp_path, [name.replace("/abs", str(tmp_path.parent))], finished=finished)
        assert earlier_output(tmp_path) is None


def test_nothing_is_written_or_removed_through_a_link_of_a_strangers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, victim = tmp_path / "repository", tmp_path / "victim"
    victim.mkdir()
    (victim / "old.txt").write_text("kept")
    repository.mkdir()
    (repository / "sub").symlink_to(victim)
    write_marker(repository, ["sub/old.txt"], finished=False)
    monkeypatch.chdir(repository)

    def write_nested() -> None:
        with atomic_folder(Path(), overwrite=True) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "new.txt").write_text("new")

    with pytest.raises(ToolError, match="unfinished"), atomic_folder(Path()):
        pass
    with pytest.raises(ToolError, match="symbolic link"):
        write_nested()
    with atomic_folder(Path(), overwrite=True) as folder:
        (folder / "own.txt").write_text("new")
    assert sorted(path.name for path in victim.iterdir()) == ["old.txt"]
    assert (repository / "own.txt").read_text() == "new"
