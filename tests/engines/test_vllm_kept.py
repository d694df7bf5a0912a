"""A kept file is read again under any name, and never becomes another one."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import peraxis_format as pf
from peraxis_format.engines.vllm.kept import KeptFile
from peraxis_format.errors import LiveModelError, PxdError
from tests.loader.support import write_delta


def delta_of(path: Path, seed: int) -> Path:
    return write_delta(path, {"w": torch.ones(16, 16, dtype=torch.bfloat16)}, seed=seed)


def kept_of(path: Path) -> KeptFile:
    with pf.open(path) as file:
        return KeptFile(file)


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    return delta_of(tmp_path / "legal.pxd", 1)


def test_it_is_read_again_when_its_name_is_gone_or_has_another_file(delta: Path, tmp_path: Path) -> None:
    with pf.open(delta) as file:
        before = file.load("w").components[0].mask.copy()
    kept = kept_of(delta)
    for _ in range(2):
        with kept.read() as file:
            assert (file.path, file.content_id) == (delta, kept.content_id)
            assert np.array_equal(file.load("w").components[0].mask, before)
        os.replace(delta_of(tmp_path / "new", 2), delta)
    delta.unlink()
    kept.read().close()
    kept.close()


def test_another_file_written_in_its_place_is_refused(delta: Path, tmp_path: Path) -> None:
    kept = kept_of(delta)
    delta.write_bytes(delta_of(tmp_path / "other.pxd", 2).read_bytes())
    with pytest.raises(LiveModelError, match=r"legal\.pxd: was overwritten by another file; load it again"):
        kept.read()


@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_file_is_an_error_with_its_name(delta: Path, size: int) -> None:
    kept = kept_of(delta)
    os.truncate(delta, size)
    with pytest.raises(PxdError, match=f"{delta}"):
        kept.read()


def test_it_is_the_file_that_was_opened_even_if_its_name_has_another_one_by_then(delta: Path, tmp_path: Path) -> None:
    with pf.open(delta) as file:
        os.replace(delta_of(tmp_path / "new", 2), delta)
        kept = KeptFile(file)
    with kept.read() as again:
        assert again.content_id == file.content_id


@pytest.mark.parametrize("closes", [True, False])
def test_its_descriptor_is_closed_once_also_if_it_is_forgotten(delta: Path, closes: bool) -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    before = descriptors()
    kept = kept_of(delta)
    assert descriptors() == before + 1
    if closes:
        kept.close()
        kept.close()
    del kept
    gc.collect()
    assert descriptors() == before
