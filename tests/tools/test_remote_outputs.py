"""An output at a URL keeps the rules for outputs: it replaces no input, and a failed send loses no file."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from peraxis_tools.chain import log, update
from peraxis_tools.cli import cli
from peraxis_tools.errors import ToolError
from tests.factories import write_checkpoint
from tests.tools.test_chain import start, stepped

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def states(tmp_path: Path) -> list[Path]:
    """Folders of three states of one model."""
    found = [start()]
    for seed in (1, 2):
        found.append(stepped(found[-1], seed))
    return [write_checkpoint(tmp_path / f"state-{i}", state) for i, state in enumerate(found)]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in (*arguments, "-q")])


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/chain"


def test_an_update_at_a_url_never_replaces_one_that_it_follows(states: list[Path], url: str) -> None:
    first = f"{url}/step-1.pxd"
    assert run("update", states[0], states[1], "-o", first).exit_code == 0
    before = log(url).updates
    for after in (url, first, f"{url}/*.pxd"):
        done = run("update", states[0], states[2], "--after", after, "-o", first, "--overwrite")
        assert "is an input of this run" in str(done.exception)
        done = run("compact", after, "--base", states[0], "-o", first, "--overwrite")
        assert "is an input of this run" in str(done.exception)
    assert log(url).updates == before


def test_an_output_at_a_file_url_never_replaces_a_checkpoint(states: list[Path]) -> None:
    weights = states[0] / "model.safetensors"
    before = weights.read_bytes()
    for old, new in (states[:2], states[1::-1]):
        with pytest.raises(ToolError, match="is a file of the input"):
            update(old, new, f"file://{weights}", overwrite=True)
    assert weights.read_bytes() == before


def test_the_folder_of_an_output_is_made_for_a_url_alone(states: list[Path], tmp_path: Path) -> None:
    for output in (tmp_path / "new" / "1.pxd", str(tmp_path / "new" / "1.pxd")):
        with pytest.raises((ToolError, OSError)):
            update(states[0], states[1], output)
        assert not (tmp_path / "new").exists()
    update(states[0], states[1], f"file://{tmp_path}/new/1.pxd")
    assert (tmp_path / "new" / "1.pxd").is_file()


def test_a_path_never_replaces_an_input_at_a_file_url(states: list[Path], tmp_path: Path) -> None:
    update(states[0], states[1], tmp_path / "a.pxd")
    before = (tmp_path / "a.pxd").read_bytes()
    for verb in (
        ("update", states[0], states[2], "--after", f"file://{tmp_path}/a.pxd"),
        ("convert", f"file://{tmp_path}/a.pxd", "--to", "index-value", "--base", states[0]),
    ):
        assert "is an input of this run" in str(run(*verb, "-o", tmp_path / "a.pxd", "--overwrite").exception)
    assert (tmp_path / "a.pxd").read_bytes() == before


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
def test_a_send_that_fails_leaves_the_file_that_it_was_to_replace(
    calls: int, states: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, system = f"memory://{uuid.uuid4().hex}/u.pxd", fsspec.filesystem("memory")
    first = update(states[0], states[1], target)
    done, move, remove = [0], type(system).mv, type(system).rm_file

    def failing(action: Any) -> Any:
        def act(self: Any, *arguments: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == calls:
                raise OSError("the link is down")
            return action(self, *arguments, **options)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "mv", failing(move))
        patch.setattr(type(system), "rm_file", failing(remove))
        expected = first
        with contextlib.suppress(ToolError):
            expected = update(states[0], states[2], target, overwrite=True)
    assert done[0] >= calls
    assert log(target).updates[0].content_id == expected.content_id
    again = update(states[0], states[2], target, overwrite=True)
    assert log(target).updates[0].content_id == again.content_id


def test_two_runs_that_replace_one_file_do_not_share_a_temporary_name(
    states: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, system = f"memory://{uuid.uuid4().hex}/u.pxd", fsspec.filesystem("memory")
    sent: list[str] = []
    put = type(system).put_file

    def noted(self: Any, local: str, path: str, **options: Any) -> None:
        sent.append(path)
        put(self, local, path, **options)

    monkeypatch.setattr(type(system), "put_file", noted)
    for state in states[1:]:
        update(states[0], state, target, overwrite=True)
    assert len(set(sent)) == 2
