"""Two writers of one URL: the second one gets one clear error, and nothing is replaced, whatever the store can do."""

from __future__ import annotations

import errno
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from peraxis_format.create_remote import create_remote
from tests.factories import random_storage, sign_module, write_delta

fsspec = pytest.importorskip("fsspec")
memory = pytest.importorskip("fsspec.implementations.memory")


class Store(memory.MemoryFileSystem):  # type: ignore[misc, name-defined]
    """A store with conditional requests, like S3: put_file(mode="create") is one step. between: runs before it."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    between: ClassVar[list[Any]] = []
    conditional: ClassVar[bool] = True
    _one: ClassVar[Any] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **_: Any) -> None:  # type: ignore[override]
        while self.between:
            self.between.pop()()
        with self._one:
            if mode == "create" and self.conditional and self.exists(rpath):
                raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
            self.pipe_file(rpath, Path(lpath).read_bytes())


@pytest.fixture(params=["s3", "clone", "memory", "file"])
def system(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(file system, folder). clone: a store that ignores the condition."""
    name = uuid.uuid4().hex
    if request.param == "file":
        yield fsspec.filesystem("file"), str(tmp_path / name)
    elif request.param == "memory":
        yield fsspec.filesystem("memory"), f"/{name}"
    else:
        monkeypatch.setattr(Store, "conditional", request.param == "s3")
        yield Store(), f"/{name}/run"
        Store.between.clear()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    return [
        write_delta(tmp_path / f"{i}.pxd", [sign_module(rng, "w", random_storage(rng, (16, 24)))]) for i in range(2)
    ]


def held(system: Any, target: str) -> bytes:
    found: bytes = system.cat_file(target)
    return found


def test_a_file_is_created_whole_and_never_replaced(system: Any, files: list[Path]) -> None:
    store, folder = system
    target = f"{folder}/step-00000001.pxd"
    create_remote(store, files[0], target, url="u://x")
    assert held(store, target) == files[0].read_bytes()
    with pytest.raises(FileExistsError, match=r"^u://x: exists already; another process publishes there; stop one"):
        create_remote(store, files[1], target, url="u://x")
    assert held(store, target) == files[0].read_bytes()
    assert [path.rpartition("/")[2] for path in store.find(folder)] == ["step-00000001.pxd"]


@pytest.mark.parametrize("system", ["s3", "file"], indirect=True)
def test_a_file_that_appears_after_the_look_is_not_replaced(
    system: Any, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = system
    target = f"{folder}/step-00000001.pxd"
    looks = [True]

    def blind(self: Any, path: str, **options: Any) -> bool:
        return False if looks and looks.pop() else plain(self, path, **options)

    plain = type(store).exists
    store.makedirs(folder, exist_ok=True)
    store.pipe_file(target, files[0].read_bytes())
    monkeypatch.setattr(type(store), "exists", blind)
    with pytest.raises(FileExistsError, match="another process publishes there"):
        create_remote(store, files[1], target, url="u://x")
    assert held(store, target) == files[0].read_bytes()


def test_a_store_that_ignores_the_condition_is_found_out_afterwards(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "conditional", False)
    store, target = Store(), f"/{uuid.uuid4().hex}/step-00000001.pxd"
    plain = Store.put_file

    def overtaken(self: Any, lpath: str, rpath: str, **options: Any) -> None:
        plain(self, lpath, rpath, **options)
        plain(self, str(files[1]), rpath)

    monkeypatch.setattr(Store, "put_file", overtaken)
    with pytest.raises(FileExistsError, match="another process publishes there"):
        create_remote(store, files[0], target, url="u://x")


def test_a_lost_answer_is_no_error_and_a_lost_file_is_one(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store, target = Store(), f"/{uuid.uuid4().hex}/step-00000001.pxd"
    plain = Store.put_file

    def lost(self: Any, lpath: str, rpath: str, **options: Any) -> None:
        plain(self, lpath, rpath, **options)
        raise TimeoutError("no answer")

    def half(self: Any, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes()[:-1])
        raise TimeoutError("no answer")

    monkeypatch.setattr(Store, "put_file", lost)
    create_remote(store, files[0], target, url="u://x")
    assert held(store, target) == files[0].read_bytes()
    for broken in (half, lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer"))):
        monkeypatch.setattr(Store, "put_file", broken)
        with pytest.raises(TimeoutError, match="no answer"):
            create_remote(store, files[0], f"{target}.{broken.__name__}", url="u://x")


class Hub:
    """The hub's API for one repository. meanwhile: commits of others that come before the next one."""

    def __init__(self) -> None:
        self.commits: list[dict[str, bytes]] = [{}]
        self.meanwhile: list[dict[str, bytes]] = []

    def repo_info(self, *_: Any, **__: Any) -> Any:
        return type("Info", (), {"sha": str(len(self.commits) - 1)})

    def file_exists(self, _: str, path: str, *, revision: str, **__: Any) -> bool:
        return path in self.commits[int(revision)]

    def create_commit(self, _: str, operations: list[Any], *, parent_commit: str, **__: Any) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        if self.meanwhile:
            self.commits.append({**self.commits[-1], **self.meanwhile.pop(0)})
        if int(parent_commit) != len(self.commits) - 1:
            response = type("Response", (), {"status_code": 412, "headers": {}, "request": None, "text": ""})()
            error = HfHubHTTPError.__new__(HfHubHTTPError)
            Exception.__init__(error, "412 Precondition Failed")
            error.response = response
            raise error
        new = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        self.commits.append({**self.commits[-1], **new})


class HubSystem:
    """What create_remote uses of HfFileSystem."""

    protocol = "hf"
    endpoint, token = None, None

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def invalidate_cache(self) -> None: ...

    def makedirs(self, *_: Any, **__: Any) -> None: ...

    def exists(self, path: str) -> bool:
        return False  # so that only the commit decides

    def size(self, path: str) -> int:
        return len(self.hub.commits[-1][path.removeprefix("me/run/")])

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        files = self.hub.commits[-1]
        if path.removeprefix("me/run/") not in files:
            raise FileNotFoundError(path)
        return files[path.removeprefix("me/run/")][start:end]

    def resolve_path(self, path: str) -> Any:
        found = {"repo_id": "me/run", "repo_type": "model", "revision": "main"}
        return type("Path", (), {**found, "path_in_repo": path.removeprefix("me/run/")})


def test_a_commit_of_others_to_the_hub_is_looked_at(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: hub)
    system, first, second = HubSystem(hub), "me/run/step-00000001.pxd", "me/run/step-00000002.pxd"
    hub.meanwhile = [{"README.md": b"-"}]
    create_remote(system, files[0], first, url="hf://me/run/1")
    assert hub.commits[-1] == {"README.md": b"-", "step-00000001.pxd": files[0].read_bytes()}
    hub.meanwhile = [{"step-00000002.pxd": files[1].read_bytes()}]
    with pytest.raises(FileExistsError, match=r"^hf://me/run/2: exists already"):
        create_remote(system, files[0], second, url="hf://me/run/2")
    assert hub.commits[-1]["step-00000002.pxd"] == files[1].read_bytes()
