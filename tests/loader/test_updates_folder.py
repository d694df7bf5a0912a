"""A mistyped folder of a chain is visible: in the log, and in every poll."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from peraxis_format.torch.updates import UpdateWriter, follow
from tests.loader.updates_pair import server, trainer


def test_a_missing_folder_is_logged_and_is_the_reason_of_each_poll(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "nochain"
    with caplog.at_level(logging.WARNING, "peraxis"):
        follower = follow(server(), folder)
    assert f"{folder}: no such folder yet" in caplog.text
    for _ in range(2):
        assert "no such folder yet" in follower.poll().waiting[folder]


def test_the_reason_ends_when_the_trainer_makes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    follower = follow(server(), folder)
    follower.poll()
    UpdateWriter(trainer(), folder).step()
    assert dict(follower.poll().waiting) == {}
    assert follower.step == 0


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "delta.pxd"
    file.write_bytes(b"")
    assert "is not a folder" in follow(server(), file).poll().waiting[file]


def test_both_ends_of_a_chain_say_where_they_are(tmp_path: Path) -> None:
    writer, follower = UpdateWriter(trainer(), tmp_path), follow(server(), tmp_path)
    assert repr(follower) == f"<Follower of {tmp_path}: unknown state>"
    writer.step()
    follower.poll()
    assert repr(writer) == f"<UpdateWriter to {tmp_path}: step 0>"
    assert repr(follower) == f"<Follower of {tmp_path}: step 0>"
