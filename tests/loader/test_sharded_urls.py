"""Ranks publish to a URL and follow one: the first one downloads, and other hosts get the bytes from it."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from peraxis_format.reader import DeltaFile
from peraxis_format.torch import LiveModelError
from peraxis_format.torch.updates import ShardedUpdateWriter, UpdateWriter, follow, mirror, shared_mirror
from tests.loader.support import bytes_of
from tests.loader.test_sharded_updates import Pieces, publish_alone, start, state
from tests.processes import run_ranks

fsspec = pytest.importorskip("fsspec")
NAMES = ["anchor-00000000.pxd", *(f"step-{step:08d}.pxd" for step in range(1, 5))]


def publish(system: Any, folder: Path, target: str, name: str, rank: int) -> None:
    if rank == 0:
        system.pipe_file(f"{target}/{name}", (folder / "later" / name).read_bytes())
    torch.distributed.barrier()


def from_memory(rank: int, world: int, folder: str) -> None:
    """Only rank 0's process has the store. The other ranks do not see its folder, as on another host."""
    path, mesh = start(rank, world, folder)
    shared_mirror._PIECE = 4096  # type: ignore[misc]  # several pieces a file
    reads, first = shared_mirror._reads, [True]
    shared_mirror._reads = lambda *given: not (first and first.pop()) and reads(*given)
    if rank:
        mirror.Mirror.__init__ = lambda *_: pytest.fail("only the first rank downloads")  # type: ignore[method-assign]
    system = fsspec.filesystem("memory")
    model = Pieces({name: torch.zeros_like(tensor) for name, tensor in state(0).items()}, mesh)
    with follow(model, "memory://bucket/run") as follower:
        folders: list[Any] = [None] * world
        torch.distributed.all_gather_object(folders, follower.folder)
        assert (len(set(folders)), folders[1]) == (2, folders[-1])  # ranks 1 and 2 are on one host
        for step, name in enumerate(NAMES):
            publish(system, path, "/bucket/run", name, rank)
            found = follower.poll()
            assert (found.step, len(found.applied), dict(found.waiting)) == (step, 1, {})
            assert model.whole() == bytes_of(state(step))
            kept = [each.name for each in follower.folder.glob("*.pxd")]
            assert kept == [name]
        empty = "step-00000005.pxd"
        if rank == 0:
            system.pipe_file(f"/bucket/run/{empty}", b"")
        torch.distributed.barrier()
        assert [each.name for each in follower.poll().waiting] == [empty]
        torch.distributed.barrier()
        if rank == 0:
            system.rm_file(f"/bucket/run/{empty}")
        torch.distributed.barrier()
        assert dict(follower.poll().waiting) == {}
        anchor = "anchor-00000004.pxd"
        if rank == 0:
            UpdateWriter(state(4), path / "whole").step()
            whole = (path / "whole" / NAMES[0]).read_bytes()
            system.pipe_file(f"/bucket/run/{anchor}", whole)
            system.rm_file(f"/bucket/run/{NAMES[4]}")
        torch.distributed.barrier()
        found = follower.poll()
        assert (found.step, found.applied, dict(found.waiting)) == (4, (), {})
        [kept_file] = follower.folder.glob("*.pxd")
        sizes: list[Any] = [None] * world
        torch.distributed.all_gather_object(sizes, (kept_file.name, kept_file.stat().st_size))
        assert set(sizes) == {(anchor, sizes[0][1])}
        with DeltaFile(kept_file) as delta:
            header_size = delta.header_size
        assert not any(kept_file.read_bytes()[header_size:])  # its data was not fetched
        torch.distributed.barrier()
        plain = shared_mirror.Mirror.sync
        shared_mirror.Mirror.sync = _broken  # type: ignore[method-assign]
        found = follower.poll()
        assert found.step == 4
        assert ["the link is down" in reason for reason in found.waiting.values()] == [True]
        shared_mirror.Mirror.sync = plain  # type: ignore[method-assign]
        assert dict(follower.poll().waiting) == {}
    torch.distributed.barrier()
    assert not any(each.exists() for each in folders)
    torch.distributed.destroy_process_group()


def _broken(*_: Any, **__: Any) -> None:
    raise OSError("the link is down")


def from_http(rank: int, world: int, folder: str) -> None:
    """A server on this host: the ranks share one folder, and the server sends each file once."""
    path, mesh = start(rank, world, folder)
    asked: list[str] = []

    class Listed(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            if self.path.endswith(".pxd"):
                asked.append(self.path.rpartition("/")[2])
            super().do_GET()

    url = [""]
    if rank == 0:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Listed, directory=str(path / "later")))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = [f"http://127.0.0.1:{server.server_port}"]
    torch.distributed.broadcast_object_list(url, src=0)
    model = Pieces({name: torch.zeros_like(tensor) for name, tensor in state(0).items()}, mesh)
    with follow(model, url[0]) as follower:
        assert follower.poll().step == 4
        assert model.whole() == bytes_of(state(4))
        assert sorted(asked) == (NAMES if rank == 0 else [])
        folders: list[Any] = [None] * world
        torch.distributed.all_gather_object(folders, follower.folder)
        assert len(set(folders)) == 1
    with pytest.raises(LiveModelError, match="nonsense://x"):
        follow(model, "nonsense://x")
    torch.distributed.destroy_process_group()


def to_memory(rank: int, world: int, folder: str) -> None:
    """Rank 0's process has the store: the ranks publish there, continue from there, and do not replace a file."""
    path, mesh = start(rank, world, folder)
    reads, first = shared_mirror._reads, [True]
    shared_mirror._reads = lambda *given: not (first and first.pop()) and reads(*given)
    url, system = "memory://bucket/run", fsspec.filesystem("memory")
    model = Pieces(state(0, torch.float32), mesh)
    writer = ShardedUpdateWriter(model, url, anchor_every=2)
    for step in range(3):
        model.become(state(step, torch.float32), mesh)
        done = writer.step()
        assert (done.step, writer.step_number) == (step, step)
    assert done.path == f"{url}/step-00000002.pxd"
    writer.close()
    first.append(True)
    again = ShardedUpdateWriter(model, url)
    assert (again.step_number, again.result) == (2, writer.result)
    model.become(state(3, torch.float32), mesh)
    if rank == 0:
        system.pipe_file("/bucket/run/step-00000003.pxd", (path / "later" / NAMES[4]).read_bytes())
    with pytest.raises(FileExistsError, match="another process publishes there"):
        again.step()
    assert again.step_number == 2
    if rank == 0:
        system.rm_file("/bucket/run/step-00000003.pxd")
    assert again.step().step == 3
    assert again.prune(anchors=1) != []
    if rank == 0:
        names = ["anchor-00000002.pxd", "step-00000003.pxd"]
        assert sorted(name.rpartition("/")[2] for name in system.find("/bucket/run")) == names
        server = {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}
        with follow(server, url) as follower:
            assert follower.poll().step == 3
        assert bytes_of(server) == bytes_of(state(3))
    again.close()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("job", "world"), [(to_memory, 2), (from_memory, 3), (from_http, 2)])
def test_ranks_use_a_url_together(job: Any, world: int, tmp_path: Path) -> None:
    if job is from_http:
        pytest.importorskip("aiohttp")
    publish_alone(tmp_path / "later")
    run_ranks(job, world, tmp_path)
