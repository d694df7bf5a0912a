"""atomic_file writes a file whole or not at all, leaves nothing behind, writes into devices, and names its errors."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import peraxis_format as pxd
from peraxis_format import files


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write a file: without a name until it is whole, and under a temporary name."""
    if request.param == "named":
        monkeypatch.setattr(files, "_DESCRIPTORS", "/no/such/folder")
    return str(request.param)


def write(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    with pxd.atomic_file(path, overwrite=overwrite) as file:
        file.write(data)


def test_a_file_has_its_name_when_it_is_whole_and_not_before(way: str, tmp_path: Path) -> None:
    with pxd.atomic_file(tmp_path / "a") as file:
        file.write(b"one")
        file.flush()
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"one"
    write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_old_file_and_nothing_else(way: str, tmp_path: Path) -> None:
    write(tmp_path / "a", b"old")

    def fail() -> None:
        with pxd.atomic_file(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_without_overwrite_a_file_that_has_appeared_meanwhile_stays(way: str, tmp_path: Path) -> None:
    def late() -> None:
        with pxd.atomic_file(tmp_path / "a", overwrite=False) as file:
            file.write(b"mine")
            (tmp_path / "a").write_bytes(b"theirs")

    with pytest.raises(FileExistsError) as caught:
        late()
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a"]


def test_the_rights_of_a_new_file_are_those_of_any_other(way: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_name_of_full_length_can_be_written(way: str, tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write(path, b"1")
    write(path, b"2")
    assert path.read_bytes() == b"2"


def test_a_link_is_replaced_and_its_target_stays(way: str, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"of a cache")
    (tmp_path / "a").symlink_to("blob")
    write(tmp_path / "a", b"new")
    assert (tmp_path / "blob").read_bytes() == b"of a cache"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_pipe_is_written_into_and_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write(tmp_path / "pipe", b"through", overwrite=False)
    reader.join()
    assert found == [b"through"]
    assert (tmp_path / "pipe").is_fifo()


def test_devices_and_open_files_are_written_into(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    write(Path("/dev/null"), b"gone", overwrite=False)
    assert os.path.samestat(os.stat("/dev/null"), before)
    code = (
        "import peraxis_format as pxd\nfor name in ('/dev/stdout', '/dev/fd/1', '/proc/self/fd/1'):\n"
        "    print('said', flush=False)\n    with pxd.atomic_file(name) as f: f.write(name.encode() + b'\\n')"
    )
    expected = "".join(f"said\n{name}\n" for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"))
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == expected
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stdout == expected


def test_a_write_that_fails_names_the_file_and_the_bytes(way: str, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="after 4096 bytes") as caught:
            write(tmp_path / "a", bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "a"))
    assert os.listdir(tmp_path) == []


def run_killed(body: str) -> None:
    code = f"import os, signal, pathlib, peraxis_format as pxd\n{textwrap.dedent(body)}"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def test_a_killed_writer_of_an_unnamed_file_leaves_nothing(tmp_path: Path) -> None:
    run_killed(f"""
        with pxd.atomic_file({str(tmp_path / "a")!r}) as file:
            file.write(b"part"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert os.listdir(tmp_path) == []


def leave_file(folder: Path) -> None:
    run_killed(f"""
        path, descriptor = pxd.new_temporary(pathlib.Path({str(folder)!r}))
        os.kill(os.getpid(), signal.SIGKILL)
    """)


def leave_folder(folder: Path) -> None:
    run_killed(f"""
        path, descriptor = pxd.new_temporary(pathlib.Path({str(folder)!r}), is_folder=True)
        (path / "part").write_bytes(b"part")
        os.kill(os.getpid(), signal.SIGKILL)
    """)


@pytest.mark.parametrize("leave", [leave_file, leave_folder])
def test_what_a_killed_run_left_is_removed_by_the_next(leave: Callable[[Path], None], tmp_path: Path) -> None:
    leave(tmp_path)
    (left,) = tmp_path.iterdir()
    assert len(left.name) < 20
    write(tmp_path / "other", b"")
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_living_run_holds_stays(is_folder: bool, tmp_path: Path) -> None:
    held, descriptor = pxd.new_temporary(tmp_path, is_folder=is_folder)
    code = f"import pathlib, peraxis_format as pxd; pxd.remove_leftovers(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert held.exists()
    os.close(descriptor)
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not held.exists()


def test_names_that_only_look_like_ours_are_not_removed(tmp_path: Path) -> None:
    names = [".peraxis~notes", ".peraxis~0123456", ".peraxis~012345678", "peraxis~01234567", ".a.pxd.0123.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    write(tmp_path / "a", b"")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "a"])


def test_one_process_holds_a_name_and_the_other_is_told_which(tmp_path: Path) -> None:
    code = (
        "import pathlib, peraxis_format as pxd\n"
        f"with pxd.name_lock(pathlib.Path({str(tmp_path)!r}), '0' * 8) as other: print(other)"
    )
    with pxd.name_lock(tmp_path, "0" * 8) as other:
        assert other is None
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout == f"{os.getpid()}\n"
    free = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert free.stdout == "None\n"
    assert os.listdir(tmp_path) == []


def place(path: Path, kind: str, target: Path) -> None:
    target.write_text("mine")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "hard link":
        os.link(target, path)
    else:
        path.symlink_to({"link": target, "dangling link": target.with_name("gone"), "loop": path}[kind])


@pytest.mark.parametrize("kind", ["link", "dangling link", "loop", "pipe", "folder", "hard link"])
def test_a_name_of_a_lock_that_is_none_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / (".peraxis~" + "0" * 8), tmp_path / "target"
    place(path, kind, target)
    with pytest.raises(FileExistsError, match="is not a lock") as caught, pxd.name_lock(tmp_path, "0" * 8):
        pass
    assert caught.value.filename == str(path)
    assert os.path.lexists(path)
    assert target.read_text() == "mine"
    assert not (tmp_path / "gone").exists()


def test_a_lock_that_others_keep_removing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peraxis_format.files._is_named", lambda *_: False)
    with pytest.raises(FileExistsError, match="is not a lock"), pxd.name_lock(tmp_path, "0" * 8):
        pass
