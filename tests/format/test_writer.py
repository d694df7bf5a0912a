"""DeltaWriter writes the same bytes for the same content, and a file whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import peraxis_format as pxd
from tests.factories import random_storage, sign_module, write_delta


def modules(seed: int = 0) -> list[pxd.ModuleDelta]:
    rng = np.random.default_rng(seed)
    axes = (pxd.Axis.ROW, pxd.Axis.COL, pxd.Axis.ROW_COL, pxd.Axis.TENSOR)
    return [
        sign_module(rng, f"layers.{i}.weight", random_storage(rng, (8 + i, 20)), axes=axes[: i + 1]) for i in range(4)
    ]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_delta(tmp_path / "a.pxd", modules(), assets={"config.json": b"{}"})
    second = write_delta(tmp_path / "b.pxd", modules(), assets={"config.json": b"{}"})
    assert first.read_bytes() == second.read_bytes()


def test_other_content_gives_another_content_id(tmp_path: Path) -> None:
    with (
        pxd.open(write_delta(tmp_path / "a.pxd", modules(0))) as a,
        pxd.open(write_delta(tmp_path / "b.pxd", modules(1))) as b,
    ):
        assert a.content_id != b.content_id


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_safetensors_reads_the_same_tensors(tmp_path: Path, framework: str) -> None:
    path = write_delta(tmp_path / "a.pxd", modules(), assets={"config.json": b"{}"})
    with pxd.open(path) as delta, safe_open(path, framework) as file:
        assert set(file.keys()) == {record.name for record in delta.records}
        assert {entry.tensor() for entry in delta.manifest.modules} <= {
            (record.name, record.dtype, record.shape) for record in delta.records
        }
        for name in delta:
            found = np.asarray(file.get_tensor(f"{name}.delta")).tobytes()
            for part, (_, array) in zip(delta.tensors(name), delta[name].tensors(), strict=True):
                begin = part.begin - delta.tensors(name)[0].begin
                assert found[begin : begin + array.nbytes] == array.tobytes()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = modules()
    with pxd.open(write_delta(tmp_path / "a.pxd", written)) as delta:
        assert list(delta) == [module.name for module in written]
        for module in written:
            read = delta.load(module.name)
            assert (read.name, read.shape, read.dtype, read.encoding, read.base) == (
                module.name,
                module.shape,
                module.dtype,
                module.encoding,
                module.base,
            )
            for (suffix, a), (other, b) in zip(read.tensors(), module.tensors(), strict=True):
                assert suffix == other
                assert np.array_equal(a.view(np.uint8), b.view(np.uint8))


def test_a_scale_that_readers_refuse_is_refused_before_it_is_written(tmp_path: Path) -> None:
    (module, *_) = modules()
    component = module.components[0]
    assert component.row is not None
    component.row[0] = np.nan
    with pytest.raises(pxd.ShapeError, match="E305"):
        write_delta(tmp_path / "a.pxd", [module])
    assert list(tmp_path.iterdir()) == []


def test_content_that_breaks_the_specification_is_the_callers_to_correct(tmp_path: Path) -> None:
    module = sign_module(np.random.default_rng(0), "a b", random_storage(np.random.default_rng(0), (8, 20)))
    with pytest.raises(pxd.ProfileError, match=r"E206.*correct what the writer was given"):
        write_delta(tmp_path / "a.pxd", [module])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["name", "metadata", "module", "chained"])
def test_a_text_that_is_no_unicode_is_the_callers_to_correct(place: str, tmp_path: Path) -> None:
    """The name of a file in bytes that are not UTF-8 is such a text in Python."""
    odd, rng = "a\udcff", np.random.default_rng(0)
    named = pxd.Identity(id=odd if place == "name" else "t")
    chained = place == "chained"
    with pxd.DeltaWriter(tmp_path / "d.pxd", base=pxd.Identity(id="b"), fine_tuned=named, chained=chained) as writer:
        writer.add(sign_module(rng, odd if place in ("module", "chained") else "w", random_storage(rng, (16, 24))))
        writer.metadata["x"] = odd if place == "metadata" else ""
        with pytest.raises(pxd.ProfileError, match=r"E202: .*a text is not Unicode, at '.*a\\udcff.*correct what the"):
            writer.finish()
    assert not (tmp_path / "d.pxd").exists()


def test_without_finish_nothing_appears(tmp_path: Path) -> None:
    with pxd.DeltaWriter(tmp_path / "a.pxd", base=pxd.Identity(id="b"), fine_tuned=pxd.Identity(id="f")) as writer:
        writer.add(modules()[0])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
        import os, signal, numpy as np, peraxis_format as pxd
        b = pxd.Identity(id="b")
        writer = pxd.DeltaWriter({str(tmp_path / "a.pxd")!r}, base=b, fine_tuned=b)
        writer.add(pxd.ModuleDelta(name="n", shape=(4096,), dtype=pxd.DType.F32, encoding=pxd.Encoding.FULL,
                                   full=np.zeros(4096, np.float32)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []
