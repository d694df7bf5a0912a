"""DeltaFile reads files, and refuses bad ones with the right code. The conformance corpus has many more cases."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peraxis_format as pxd
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta

NAMES = [f"{letter}.weight" for letter in "abcdefghijklmnopqrstuvw"]


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    # This number of modules gives a header of two blocks.
    modules = [sign_module(rng, name, random_storage(rng, (9, 21))) for name in NAMES]
    return write_delta(tmp_path / "delta.pxd", modules, assets={"config.json": b"{}"})


def code_of(path: Path) -> str:
    with pytest.raises(pxd.PxdError) as caught:
        pxd.open(path).close()
    assert str(path) in str(caught.value)
    assert caught.value.remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.code


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


FOREIGN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": ("E103", lambda p: p.write_bytes(b"")),
    "LFS pointer": ("E104", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    "HTML": ("E105", lambda p: p.write_text("\n<!DOCTYPE html><title>Sign in</title>" * 200)),
    "torch archive": ("E106", _zip),
    "pickle": ("E107", lambda p: p.write_bytes(pickle.dumps({"weights": [1, 2]}))),
    "zeros": ("E108", lambda p: p.write_bytes(bytes(10_000))),
    "text": ("E109", lambda p: p.write_text("hello " * 2000)),
    "folder": ("E101", lambda p: p.mkdir()),
    "pipe": ("E101", lambda p: os.mkfifo(p)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_pxd_file_is_told_apart(tmp_path: Path, kind: str) -> None:
    code, make = FOREIGN[kind]
    make(tmp_path / "file")
    assert code_of(tmp_path / "file") == code


def test_a_checkpoint_is_not_taken_for_a_delta(tmp_path: Path) -> None:
    tensor = (np.zeros((4, 4), np.float32), pxd.DType.F32)
    folder = write_checkpoint(tmp_path / "model", {"w": tensor})
    assert code_of(folder / "model.safetensors") == "E112"


def test_a_truncated_download_is_named_as_such(delta: Path) -> None:
    data = delta.read_bytes()
    with pxd.open(delta) as file:
        header = file.header_size
    for size, code in ((100, "E103"), (4096, "E111"), (header - 1, "E111"), (header, "E124"), (len(data) - 1, "E124")):
        delta.write_bytes(data[:size])
        assert code_of(delta) == code, size


def test_a_byte_too_many_is_refused(delta: Path) -> None:
    delta.write_bytes(delta.read_bytes() + b"\0")
    assert code_of(delta) == "E125"


def test_a_newer_version_is_not_called_damaged(delta: Path) -> None:
    delta.write_bytes(delta.read_bytes().replace(b'"pxd":"1.0"', b'"pxd":"1.7"', 1))
    with pytest.raises(pxd.UnsupportedError) as caught:
        pxd.open(delta)
    assert (caught.value.code, caught.value.exit_status) == ("E201", 3)


def test_any_flipped_payload_bit_is_found_whatever_the_threads(delta: Path) -> None:
    whole = delta.read_bytes()
    with pxd.open(delta) as file:
        begin = file.header_size
    for offset in range(begin, len(whole), 167):
        damaged = bytearray(whole)
        damaged[offset] ^= 1
        delta.write_bytes(damaged)
        codes = set()
        for workers in (1, 4):
            with pxd.open(delta) as file, pytest.raises(pxd.PayloadError) as caught:
                file.verify(workers=workers)
            codes.add((caught.value.code, caught.value.field))
        assert len(codes) == 1


def test_a_pad_within_a_module_is_checked_by_load_too(delta: Path) -> None:
    # The digest covers this pad, so the file gets the digest of the damaged range.
    data = bytearray(delta.read_bytes())
    with pxd.open(delta) as file:
        begin, end = file.span("a.weight")
        mask = file.tensors("a.weight")[0]
        data[file.header_size + mask.end] = 1
        sha256 = hashlib.sha256(data[begin:end]).hexdigest()
        first, *rest = file.manifest.modules
        manifest = replace(file.manifest, modules=(replace(first, sha256=sha256), *rest))
        header = pxd.header_bytes(manifest.to_bytes(), file.records)
    delta.write_bytes(header + data[len(header) :])
    with pxd.open(delta) as file, pytest.raises(pxd.PayloadError) as caught:
        file.load("a.weight")
    assert caught.value.code == "E304"


@pytest.mark.parametrize("size", [2**16 - 3, 2**16, 2**20])
def test_a_key_of_metadata_may_be_as_long_as_metadata(delta: Path, size: int) -> None:
    with pxd.open(delta) as file:
        manifest = replace(file.manifest, metadata={"k" * size: "value"})
        header, data = pxd.header_bytes(manifest.to_bytes(), file.records), delta.read_bytes()[file.header_size :]
    delta.write_bytes(header + data)
    with pxd.open(delta) as file:
        assert dict(file.manifest.metadata) == {"k" * size: "value"}


def test_opening_reads_the_header_alone(delta: Path) -> None:
    calls: list[tuple[int, int]] = []
    data = delta.read_bytes()

    def read(offset: int, size: int) -> bytes:
        calls.append((offset, size))
        return data[offset : offset + size]

    header, manifest = pxd.read_header(read, len(data))
    assert len(manifest.modules) == len(NAMES)
    assert max(offset + size for offset, size in calls) <= header.size


def test_views_outlive_the_file(delta: Path) -> None:
    with pxd.open(delta) as file:
        mask = file["a.weight"].components[0].mask
        copy = mask.copy()
    assert np.array_equal(mask, copy)


def test_a_wrong_base_is_named(delta: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    right = {}
    for name in NAMES:
        right[name] = (random_storage(rng, (9, 21)), pxd.DType.BF16)
        sign_module(rng, name, right[name][0])
    cases = {
        "E401": {"x": right["a.weight"]},
        "E402": {"a.weight": right["a.weight"]},
        "E403": right | {"b.weight": (right["b.weight"][0][:8], pxd.DType.BF16)},
        "E404": right | {"b.weight": (right["b.weight"][0] ^ 1, pxd.DType.BF16)},
    }
    for code, tensors in cases.items():
        folder = write_checkpoint(tmp_path / code, tensors)
        with pxd.open(delta) as file, pxd.Safetensors.open(folder) as base, pytest.raises(pxd.BindingError) as caught:
            pxd.check_base(file.manifest, base)
        assert caught.value.code == code
    with pxd.open(delta) as file, pxd.Safetensors.open(write_checkpoint(tmp_path / "right", right)) as base:
        pxd.check_base(file.manifest, base)


class Walked(tuple[Any, ...]):
    """A tuple that counts the walks over it."""

    __slots__ = ()
    walks = 0

    def __iter__(self) -> Iterator[Any]:
        type(self).walks += 1
        return super().__iter__()


def test_reading_every_asset_walks_the_list_of_assets_once(tmp_path: Path) -> None:
    assets = {f"a{i:02d}.json": b"%d" % i for i in range(50)}
    rng = np.random.default_rng(0)
    module = sign_module(rng, "w", random_storage(rng, (9, 21)))
    with pxd.open(write_delta(tmp_path / "delta.pxd", [module], assets=assets)) as file:
        file.manifest = replace(file.manifest, assets=Walked(file.manifest.assets))
        assert {path: file.asset(path) for path in assets} == assets
        file.verify()
    assert Walked.walks == 1


@pytest.mark.parametrize("url", ["https://host/a.pxd", "file:///tmp/a.pxd", "s3://bucket/a.pxd"])
def test_a_url_is_called_one_and_not_a_missing_file(url: str) -> None:
    with pytest.raises(FileNotFoundError, match="is a URL and not a file; fetch it first"):
        pxd.open(url)
    with pytest.raises(FileNotFoundError, match="No such file"):
        pxd.open("folder/b.pxd")


def test_chunks_have_a_byte_at_least(delta: Path) -> None:
    with pxd.open(delta) as file, pytest.raises(ValueError, match="size 0: must be 1 or more"):
        next(file.chunks(next(iter(file)), size=0))
