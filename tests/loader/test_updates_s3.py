"""Chains in an S3 store: the real client (s3fs) against a server that speaks the protocol (moto)."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peraxis_format import create_remote as creation
from peraxis_format.create_remote import create_remote
from peraxis_format.torch.updates import UpdateWriter, follow
from peraxis_tools.chain import log, update
from peraxis_tools.errors import CheckFailedError
from tests.factories import write_checkpoint
from tests.loader.support import bytes_of
from tests.loader.test_updates_urls import check_second_trainer_is_refused, empty, publish, state
from tests.tools.test_chain import start

server = pytest.importorskip("moto.server", reason="moto is not installed (pip install peraxis[stores])")
boto3 = pytest.importorskip("boto3")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (pip install peraxis[stores])")


@pytest.fixture(scope="module", autouse=True)
def store() -> Iterator[None]:
    """A store on a free port, with one bucket; programs that the tests start find it by their environment."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield
        s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture
def url() -> str:
    return f"s3://bucket/{uuid.uuid4().hex}"


def tools(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "peraxis_tools", *arguments], capture_output=True, text=True)


def test_what_is_published_in_a_bucket_is_what_a_server_follows_from_it(url: str) -> None:
    live, weights = state(0), empty()
    writer = UpdateWriter(live, url)
    with follow(weights, url) as follower:
        for step in range(4):
            publish(writer, live, range(step, step + 1))
            found = follower.poll()
            assert (found.step, found.lag, dict(found.waiting)) == (step, 0, {})
            assert bytes_of(weights) == bytes_of(state(step))
    listed = tools("log", url)
    assert (listed.returncode, listed.stdout.count("step-")) == (0, 3), listed.stderr
    assert tools("verify", f"{url}/step-00000002.pxd").returncode == 0


def test_a_fork_at_a_bucket_is_not_written(url: str, tmp_path: Path) -> None:
    base, *states = (write_checkpoint(tmp_path / str(seed), start(seed)) for seed in range(3))
    update(base, states[0], f"{url}/1.pxd")
    with pytest.raises(CheckFailedError, match=r"/2\.pxd: would be a fork, because 1\.pxd was made on the same state"):
        update(base, states[1], f"{url}/2.pxd")
    assert [entry.name for entry in log(url).updates] == ["1.pxd"]


def test_a_second_trainer_at_a_bucket_is_refused(url: str) -> None:
    check_second_trainer_is_refused(url)


@pytest.mark.parametrize("size", [1 << 10, 60 << 20], ids=["one request", "in parts"])
def test_of_two_files_that_are_sent_at_one_moment_the_store_takes_one(
    url: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "first.pxd", tmp_path / "second.pxd"]
    for number, file in enumerate(files):
        file.write_bytes((8).to_bytes(8, "little") + bytes([number]) * size)
    system, target = s3fs.S3FileSystem(), f"{url.removeprefix('s3://')}/step.pxd"
    send = creation._create

    def after_the_other(*arguments: Any) -> None:
        monkeypatch.setattr(creation, "_create", send)
        create_remote(system, files[0], target, url=url)
        send(*arguments)

    monkeypatch.setattr(creation, "_create", after_the_other)
    with pytest.raises(FileExistsError, match="another process publishes there"):
        create_remote(system, files[1], target, url=url)
    assert system.cat_file(target, start=0, end=16) == files[0].read_bytes()[:16]


@pytest.mark.parametrize("place", ["s3://bucket/nothing/step.pxd", "s3://no-such-bucket/step.pxd"])
def test_a_place_that_is_not_there_is_one_line(place: str) -> None:
    done = tools("inspect", place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {place}: cannot be read")
    assert done.stderr.count("\n") == 1
