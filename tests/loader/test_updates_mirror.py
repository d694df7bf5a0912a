"""A follower of a URL fetches faulty and replaced files again, and a store that fails is no store without a chain."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format.torch.updates import UpdateWriter, follow
from peraxis_format.torch.updates.mirror import Mirror

fsspec = pytest.importorskip("fsspec")
ANCHOR, STEP = "anchor-00000000.pxd", "step-00000001.pxd"


@pytest.fixture
def folder() -> str:
    """A folder of the store in memory, which is memory:/<folder> as a URL."""
    return f"/{uuid.uuid4().hex}"


def chain(path: Path) -> tuple[dict[str, bytes], Tensor]:
    """The files of two states, and the last state."""
    model = {"a": torch.arange(64).bfloat16()}
    writer = UpdateWriter(model, path)
    writer.step()
    model["a"] += 1
    writer.step()
    return {file.name: file.read_bytes() for file in path.iterdir()}, model["a"]


def damaged(data: bytes) -> bytes:
    return data[:-70] + bytes([data[-70] ^ 1]) + data[-69:]


@pytest.mark.parametrize("change", [lambda data: data[:2000], damaged, lambda _: b""])
@pytest.mark.parametrize("tells", [True, False])
def test_a_faulty_file_is_fetched_again(
    change: Any, tells: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, last = chain(tmp_path)
    store = fsspec.filesystem("memory")
    if not tells:  # as many HTTP servers
        monkeypatch.setattr("peraxis_format.torch.updates.mirror._stamp", lambda _: ())
    live = {"a": torch.zeros(64).bfloat16()}
    store.pipe(f"{folder}/{ANCHOR}", files[ANCHOR])
    store.pipe(f"{folder}/{STEP}", change(files[STEP]))
    with follow(live, f"memory:/{folder}") as follower:
        found = follower.poll()
        assert found.step == 0
        assert STEP in next(iter(found.waiting.values()))
        store.pipe(f"{folder}/{STEP}", files[STEP])
        assert follower.poll().step == 1
    assert live["a"].equal(last)


def test_a_file_that_stays_faulty_is_fetched_less_and_less_often(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = chain(tmp_path)
    store = fsspec.filesystem("memory")
    store.pipe(f"{folder}/{ANCHOR}", damaged(files[ANCHOR]))
    fetched: list[int] = []
    plain, polls = Mirror._fetch, [0]

    def noted(self: Mirror, name: str) -> None:
        fetched.append(polls[0])
        plain(self, name)

    monkeypatch.setattr(Mirror, "_fetch", noted)
    with follow({"a": torch.zeros(64).bfloat16()}, f"memory:/{folder}") as follower:
        for poll in range(200):
            polls[0] = poll
            follower.poll()
    assert fetched == [0, 1, 3, 7, 15, 31, 63, 127, 191]


def test_a_file_that_was_replaced_is_fetched_again(folder: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files, last = chain(tmp_path / "chain")
    foreign = {"a": torch.zeros(64).bfloat16()}
    writer = UpdateWriter(foreign, tmp_path / "other")
    writer.step()
    foreign["a"] += 3
    wrong = Path(writer.step().path).read_bytes()
    store = fsspec.filesystem("memory")
    store.pipe(f"{folder}/{ANCHOR}", files[ANCHOR])
    store.pipe(f"{folder}/{STEP}", wrong)
    live = {"a": torch.ones(64).bfloat16()}
    with follow(live, f"memory:/{folder}") as follower:
        assert "does not continue the model's state" in next(iter(follower.poll().waiting.values()))
        store.pipe(f"{folder}/{STEP}", files[STEP])
        assert follower.poll().step == 1
    assert live["a"].equal(last)


def noted_fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are fetched whole."""
    fetched: list[str] = []
    plain = Mirror._fetch

    def noted(self: Mirror, name: str) -> None:
        fetched.append(name)
        plain(self, name)

    monkeypatch.setattr(Mirror, "_fetch", noted)
    return fetched


def test_an_anchor_of_the_state_where_a_follower_is_already_is_not_fetched(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, url = {"a": torch.arange(1 << 16).bfloat16()}, f"memory:/{folder}"
    live = {"a": torch.zeros(1 << 16).bfloat16()}
    writer = UpdateWriter(model, url, anchor_every=2)
    fetched = noted_fetches(monkeypatch)
    with follow(live, url) as follower:
        for step in range(7):
            model["a"] += 1
            writer.step()
            assert follower.poll().step == step
            writer.prune(anchors=1)
            for _ in range(2):
                found = follower.poll()
                assert (found.step, dict(found.waiting)) == (step, {})
        assert fetched == [ANCHOR, *(f"step-{step:08d}.pxd" for step in range(1, 7))]
        assert live["a"].equal(model["a"])
        # Of another state the whole file is fetched: here other code has changed the model.
        live["a"].zero_()
        follower.step = None
        follower._state = None
        assert follower.poll().step == 6
    assert live["a"].equal(model["a"])
    assert fetched[-1] == "anchor-00000006.pxd"


def test_a_store_that_gives_no_part_of_a_file_gives_the_whole(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, url = {"a": torch.arange(64).bfloat16()}, f"memory:/{folder}"
    writer = UpdateWriter(model, url, anchor_every=1)
    fetched = noted_fetches(monkeypatch)
    with follow({"a": torch.zeros(64).bfloat16()}, url) as follower:
        writer.step()
        follower.poll()
        model["a"] += 1
        writer.step()
        follower.poll()
        writer.prune(anchors=1)
        monkeypatch.setattr("peraxis_format.torch.updates.mirror.head_of", no_ranges)
        found = follower.poll()
        assert (found.step, dict(found.waiting)) == (1, {})
    assert fetched == [ANCHOR, STEP, "anchor-00000001.pxd"]


def no_ranges(*_: Any) -> bytes:
    raise ValueError("the server does not support range requests")


def test_a_store_that_fails_is_told_from_a_folder_without_a_chain(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, url = {"a": torch.arange(64).bfloat16()}, f"memory:/{folder}"
    writer = UpdateWriter(model, url, anchor_every=1)
    for _ in range(3):
        writer.step()
        model["a"] += 1
    writer.prune(anchors=1)

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        for name in ("info", "ls"):
            patch.setattr(type(fsspec.filesystem("memory")), name, down)
        with pytest.raises(ConnectionError):  # and no second chain begins
            UpdateWriter(model, url)
        with follow({"a": torch.zeros(64).bfloat16()}, url) as follower:
            assert list(follower.poll().waiting.values()) == ["reset by peer"]
    assert UpdateWriter(model, url).step_number == 2


@pytest.mark.parametrize("name", ["step-" + "9" * 5000 + ".pxd", "step-\u0661.pxd", "step-1.pxd.pxd"])
def test_a_name_that_no_writer_gives_is_ignored(name: str, folder: str, tmp_path: Path) -> None:
    files, _ = chain(tmp_path)
    store = fsspec.filesystem("memory")
    for each, data in {**files, name: b"-"}.items():
        store.pipe(f"{folder}/{each}", data)
    with follow({"a": torch.zeros(64).bfloat16()}, f"memory:/{folder}") as follower:
        assert follower.poll().step == 1


def test_a_download_over_http_may_take_long_but_not_be_silent() -> None:
    pytest.importorskip("aiohttp")
    mirror = Mirror("http://127.0.0.1:9/chain")
    options = mirror._system.client_kwargs
    assert (options["timeout"].total, options["timeout"].sock_read) == (None, 60)
    mirror.close()
