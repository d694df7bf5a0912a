"""Chains at a URL: a trainer publishes there, a server follows them, and each fetches only the bytes it needs."""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format.errors import LiveModelError
from peraxis_format.torch.updates import UpdateWriter, follow, mirror
from peraxis_format.torch.updates.mirror import Mirror
from tests.loader.support import bytes_of

fsspec = pytest.importorskip("fsspec")


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {"a": 0.02 * torch.randn((70, 90), generator=generator), "b": torch.ones(9)}
    for seed in range(1, step + 1):
        generator.manual_seed(seed)
        found["a"] += 1e-4 * torch.randn((70, 90), generator=generator)
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def empty() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def there(url: str) -> list[str]:
    system = fsspec.filesystem("memory")
    return sorted(path.rpartition("/")[2] for path in system.find(url.removeprefix("memory:/")))


def publish(writer: UpdateWriter, live: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        live.update(state(step))
        done = writer.step()
        assert done.step == step


def test_what_is_published_at_a_url_is_what_a_server_follows_from_it(url: str) -> None:
    live = state(0)
    writer = UpdateWriter(live, url)
    publish(writer, live, range(1))
    server = empty()
    with follow(server, url) as follower:
        assert follower.poll().step == 0
        for step in range(1, 4):
            publish(writer, live, range(step, step + 1))
            found = follower.poll()
            assert (found.step, found.lag, dict(found.waiting)) == (step, 0, {})
            assert bytes_of(server) == bytes_of(state(step))
            # An update that is older than the model is not kept.
            assert [path.name for path in follower.folder.iterdir()] == [f"step-{step:08d}.pxd"]
        kept = follower.folder
    assert not kept.exists()
    assert there(url) == ["anchor-00000000.pxd", *(f"step-{step:08d}.pxd" for step in (1, 2, 3))]
    assert list(writer.folder.iterdir()) == []
    assert str(writer.step().path) == f"{url}/step-00000004.pxd"


def test_a_trainer_goes_on_from_the_url_and_a_late_server_begins_at_the_newest_anchor(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = state(0)
    publish(UpdateWriter(live, url, anchor_every=2), live, range(6))
    fetched: list[str] = []
    plain = Mirror._fetch

    def counted(self: Mirror, name: str) -> None:
        fetched.append(name)
        plain(self, name)

    monkeypatch.setattr(Mirror, "_fetch", counted)
    again = UpdateWriter(live, url, anchor_every=2)
    assert again.step_number == 5
    needed = ["anchor-00000004.pxd", "step-00000004.pxd", "step-00000005.pxd"]
    assert fetched == needed
    publish(again, live, range(6, 8))
    fetched.clear()
    server = empty()
    with follow(server, url) as follower:
        assert follower.poll().step == 7
        assert bytes_of(server) == bytes_of(state(7))
    assert fetched == ["anchor-00000006.pxd", "step-00000006.pxd", "step-00000007.pxd"]
    gone = again.prune(anchors=1)
    assert gone[:2] == [f"{url}/anchor-00000000.pxd", f"{url}/step-00000001.pxd"]
    assert there(url) == ["anchor-00000006.pxd", "step-00000007.pxd"]


def test_files_that_another_program_deletes_meanwhile_do_not_stop_a_prune(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = state(0)
    writer = UpdateWriter(live, url, anchor_every=2)
    publish(writer, live, range(5))
    names, memory = Mirror.names, fsspec.filesystem("memory")

    def then_deleted(self: Mirror) -> list[str]:
        found = names(self)
        memory.rm(f"{url.removeprefix('memory:/')}/step-00000001.pxd")
        return found

    monkeypatch.setattr(Mirror, "names", then_deleted)
    writer.prune(anchors=1)
    assert there(url) == ["anchor-00000004.pxd"]


def test_a_chain_that_is_gone_is_named_by_its_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = state(0)
    writer = UpdateWriter(live, url)
    publish(writer, live, range(1))
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)
    monkeypatch.setattr(writer, "_broken_off", True)
    with pytest.raises(LiveModelError) as failed:
        writer.step()
    assert str(failed.value) == f"{url}: has no chain any more; publish to a new folder"


def test_a_missing_link_is_skipped_at_the_next_anchor(url: str) -> None:
    live = state(0)
    writer = UpdateWriter(live, url, anchor_every=3)
    publish(writer, live, range(2))
    server = empty()
    with follow(server, url) as follower:
        assert follower.poll().step == 1
        publish(writer, live, range(2, 3))
        fsspec.filesystem("memory").rm(f"{url.removeprefix('memory:/')}/step-00000002.pxd")
        assert follower.poll().step == 1
        publish(writer, live, range(3, 5))
        found = follower.poll()
        assert [path.name for path in found.applied] == ["anchor-00000003.pxd", "step-00000004.pxd"]
        assert bytes_of(server) == bytes_of(state(4))


def test_a_link_that_is_down_changes_nothing_and_is_tried_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = fsspec.filesystem("memory")
    live, server = state(0), empty()
    writer, follower = UpdateWriter(live, url), follow(server, url)
    publish(writer, live, range(1))
    follower.poll()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the link is down")

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "mv", broken)
        live.update(state(1))
        with pytest.raises(OSError, match="the link is down"):
            writer.step()
    assert writer.step_number == 0
    assert writer.step().step == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(system), "ls", broken)
        found = follower.poll()
        assert found.step == 0
        assert "the link is down" in found.waiting[Path(url)]
    assert follower.poll().step == 1
    assert bytes_of(server) == bytes_of(state(1))


def check_second_trainer_is_refused(url: str) -> None:
    """A trainer that opened the chain before another one published a step fails at its own step."""
    live, other = state(0), state(0)
    first = UpdateWriter(live, url)
    publish(first, live, range(1))
    second = UpdateWriter(other, url)
    publish(first, live, range(1, 2))
    other.update(state(7))
    with pytest.raises(FileExistsError, match="another process publishes there"):
        second.step()
    assert second.step_number == 0


def test_two_trainers_at_one_url_are_noticed(url: str) -> None:
    check_second_trainer_is_refused(url)


def test_two_trainers_that_publish_at_one_moment_do_not_replace_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.format.test_create_remote import Store

    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "s3", Store)
    url = f"s3://bucket/{uuid.uuid4().hex}"
    live, other = state(0), state(0)
    first = UpdateWriter(live, url)
    publish(first, live, range(1))
    second = UpdateWriter(other, url)
    live.update(state(1))
    other.update(state(7))
    Store.between.append(first.step)  # after the second one has looked
    with pytest.raises(FileExistsError, match=r"step-00000001\.pxd: exists already; another process publishes there"):
        second.step()
    assert (first.step_number, second.step_number) == (1, 0)
    server = empty()
    with follow(server, url) as follower:
        assert follower.poll().step == 1
    assert bytes_of(server) == bytes_of(state(1))


def test_a_published_file_that_another_trainer_replaced_is_found_at_the_next_step(url: str, tmp_path: Path) -> None:
    live = state(0)
    writer = UpdateWriter(live, url)
    publish(writer, live, range(2))
    system, target = fsspec.filesystem("memory"), f"{url.removeprefix('memory:/')}/step-00000001.pxd"
    system.pipe_file(target, system.cat_file(f"{url.removeprefix('memory:/')}/anchor-00000000.pxd"))
    with pytest.raises(FileExistsError, match=r"step-00000001\.pxd: was replaced by another process"):
        writer.step()
    system.rm_file(target)  # pruned by another program: no conflict
    assert writer.step().step == 2


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(LiveModelError, match="nonsense://x"):
        follow(state(0), "nonsense://x")


def test_a_download_ends_at_the_announced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/endless/step-00000001.pxd", b"x" * 100)
    monkeypatch.setattr(type(memory), "info", lambda *_: {"size": 10})
    monkeypatch.setattr(type(memory), "get_file", endless)
    mirror = Mirror("memory://endless")
    with pytest.raises(OSError, match="more than the 10 bytes"):
        mirror._fetch("step-00000001.pxd")
    assert not (mirror.folder / "step-00000001.pxd").exists()
    mirror.close()


def endless(_: object, source: str, target: str, callback: Any) -> None:
    """Stand in for a server whose answer does not end."""
    while True:
        callback.relative_update(4)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_follower_of_a_url_names_an_update_with_the_name_of_no_step_and_fetches_only_its_header_once(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4().hex}/run" if scheme == "memory" else f"file://{tmp_path}/run"
    system, place = fsspec.core.url_to_fs(url)
    live, server = state(0), empty()
    writer = UpdateWriter(live, url)
    publish(writer, live, range(3))
    system.mv(f"{place}/step-00000002.pxd", f"{place}/hotfix.pxd")
    system.pipe(f"{place}/notes.pxd", b"no update")
    fetched: list[str] = []
    fetch = Mirror._fetch_header

    def counted(self: Mirror, name: str) -> bool:
        fetched.append(name)
        return fetch(self, name)

    def no_other(self: Mirror, name: str, *, whole: Any = Mirror._fetch) -> None:
        assert name not in ("hotfix.pxd", "notes.pxd")
        whole(self, name)

    monkeypatch.setattr(Mirror, "_fetch_header", counted)
    monkeypatch.setattr(Mirror, "_fetch", no_other)
    with follow(server, url) as follower:
        for _ in range(3):
            found = follower.poll()
            assert found.step == 1
            wanted = (
                f"{url}/hotfix.pxd: is passed over, because its name is not that of a step; rename it to step-00000002"
            )
            assert [reason.partition(".pxd, because it follows")[0] for reason in found.waiting.values()] == [wanted]
        assert sorted(name for name in fetched if "anchor" not in name) == ["hotfix.pxd", "notes.pxd"]
        system.mv(f"{place}/hotfix.pxd", f"{place}/step-00000002.pxd")
        found = follower.poll()
        assert (found.step, dict(found.waiting)) == (2, {})
    assert bytes_of(server) == bytes_of(state(2))


def test_a_follower_of_a_url_does_not_name_an_update_that_folds_steps_which_it_no_longer_needs(url: str) -> None:
    live, server = state(0), empty()
    writer = UpdateWriter(live, url)
    publish(writer, live, range(3))
    system = fsspec.filesystem("memory")
    system.cp_file(url.removeprefix("memory:/") + "/step-00000001.pxd", url.removeprefix("memory:/") + "/fold.pxd")
    with follow(server, url) as follower:
        for step in range(3, 6):
            publish(writer, live, range(step, step + 1))
            found = follower.poll()
            assert (found.step, dict(found.waiting)) == (step, {})


def test_the_end_of_with_removes_the_local_files_of_a_trainer_and_of_a_server(url: str) -> None:
    live, server = state(0), empty()
    with UpdateWriter(live, url) as writer, follow(server, url) as follower:
        publish(writer, live, range(2))
        assert follower.poll().step == 1
        folders = [writer.folder, follower.folder]
        assert all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() for folder in folders)
    assert there(url) == ["anchor-00000000.pxd", "step-00000001.pxd"]


def test_an_error_within_with_is_raised_and_a_trainer_in_a_folder_may_be_used_after_it(tmp_path: Path) -> None:
    live = state(0)
    with pytest.raises(ZeroDivisionError), UpdateWriter(live, tmp_path) as writer:
        raise ZeroDivisionError
    assert writer.step().step == 0


def test_a_misnamed_update_is_named_though_the_store_failed_once_while_its_header_was_read(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, server = state(0), empty()
    writer = UpdateWriter(live, url)
    publish(writer, live, range(3))
    place = url.removeprefix("memory:/")
    fsspec.filesystem("memory").mv(f"{place}/step-00000002.pxd", f"{place}/hotfix.pxd")
    read, broken = mirror.head_of, [True]

    def failing(system: Any, target: str) -> bytes:
        if broken and target.endswith("hotfix.pxd"):
            broken.pop()
            raise RuntimeError("the store is away")
        return read(system, target)

    monkeypatch.setattr(mirror, "head_of", failing)
    with follow(server, url) as follower:
        assert not follower.poll().waiting
        assert [path.name for path in follower.poll().waiting] == ["hotfix.pxd"]
