"""Wires of other systems, written only from their published descriptions, for the tests of convert."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peraxis_format as pxd
from peraxis_tools.checkpoints.checkpoint import open_checkpoint

arrow = pytest.importorskip("pyarrow")
Tensors = dict[str, tuple[np.ndarray, pxd.DType]]
TORCH = {pxd.DType.BF16: torch.bfloat16, pxd.DType.F16: torch.float16, pxd.DType.F32: torch.float32}
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


def start() -> Tensors:
    random = np.random.default_rng(0)

    def weights(shape: tuple[int, ...], dtype: pxd.DType) -> tuple[np.ndarray, pxd.DType]:
        return pxd.from_float32((random.standard_normal(shape) * 0.02).astype(np.float32), dtype), dtype

    return {
        "model.embed_tokens.weight": weights((1200, 64), pxd.DType.BF16),
        UP: weights((96, 64), pxd.DType.BF16),
        DOWN: weights((64, 96), pxd.DType.F16),
        NORM: weights((64,), pxd.DType.F32),
    }


def words(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(f"<u{array.dtype.itemsize}")


def stepped(tensors: Tensors, seed: int) -> Tensors:
    """Return a training step: a few weights change, a run of the norm, and the embedding's first and last weight."""
    random = np.random.default_rng(seed)
    after = {name: (array.copy(), dtype) for name, (array, dtype) in tensors.items()}
    for name in (UP, DOWN):
        found = words(after[name][0])
        found[random.random(found.size) < 0.05] ^= 1
        found[random.integers(0, found.size, 3)] = [0x7FC1, 0x8000, 0xFFFF]  # NaN and -0 are ordinary bit patterns
    words(after[NORM][0])[10:20] += 5
    words(after["model.embed_tokens.weight"][0])[[0, -1]] ^= 3  # a gap beyond 16 bits
    return after


def tensor(array: np.ndarray, dtype: pxd.DType) -> torch.Tensor:
    return torch.from_numpy(array.copy()).view(TORCH[dtype])


# --- fixtures, as the projects describe their wires --------------------------------------------------------------


def index_value(folder: Path, old: Tensors, new: Tensors) -> Path:
    """Write the wire of vLLM and TRL: for each parameter int32 flat indices and absolute values."""
    saved = {}
    for name, (array, dtype) in new.items():
        index = torch.from_numpy(np.flatnonzero(words(array) != words(old[name][0])))
        if index.numel():
            saved[f"{name}.indices"] = index.to(torch.int32)
            saved[f"{name}.values"] = tensor(array, dtype).reshape(-1)[index].clone()
    save_file(saved, folder / "patch.safetensors")
    return folder / "patch.safetensors"


def nemo(folder: Path, old: Tensors, new: Tensors, *, operation: str = "xor") -> Path:
    """Write the wire of NeMo-RL: gaps in the smallest width, XOR, ranges of contiguous changes; torch.save, zstd 1."""
    locations: list[bytes] = []
    groups: dict[int, list[np.ndarray]] = {}
    metadata: list[dict[str, Any]] = []
    for name, (array, dtype) in new.items():
        before, after = words(old[name][0]), words(array)
        index = np.flatnonzero(before != after)
        values = (before ^ after if operation == "xor" else after)[index].view(f"<i{after.itemsize}")
        group = groups.setdefault(after.itemsize, [])
        begin, at = sum(part.size for part in group), sum(map(len, locations))
        group.append(values)
        item = {"name": name, "shape": array.shape, "dtype": str(TORCH[dtype]).removeprefix("torch.")}
        item |= {"operation": operation, "value_group": list(groups).index(after.itemsize)}
        item |= {"value_start": begin, "value_end": begin + index.size, "index_start": at}
        if index[-1] - index[0] + 1 == index.size:
            item |= {"index_encoding": "range", "range_start": int(index[0]), "index_end": at}
        else:
            gaps = np.diff(index, prepend=-1) - 1
            locations.append(gaps.astype(np.uint16 if gaps.max() < 1 << 16 else np.uint32).tobytes())
            item |= {"index_encoding": "deltas", "index_end": at + len(locations[-1])}
        metadata.append(item)
    joined = torch.from_numpy(np.frombuffer(b"".join(locations), np.uint8).copy())
    buffer = io.BytesIO()
    torch.save((joined, tuple(torch.from_numpy(np.concatenate(parts)) for parts in groups.values()), metadata), buffer)
    path = folder / "payload.bin"
    path.write_bytes(arrow.Codec("zstd", compression_level=1).compress(buffer.getvalue(), asbytes=True))
    return path


def xor(folder: Path, old: Tensors, new: Tensors) -> Path:
    """Write the wire of slime: zstd of XOR of raw bytes as U8, checksums of the new bytes in the metadata, an index."""
    path = folder / "weight_v000001"
    path.mkdir()
    saved, checksums = {}, {}
    for name, (array, _) in new.items():
        xored = words(array) ^ words(old[name][0])
        packed = arrow.Codec("zstd", compression_level=1).compress(xored.tobytes(), asbytes=True)
        saved[name] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        checksums[name] = f"{zlib.adler32(array.tobytes()):08x}"
    save_file(saved, path / "model-00001-of-00001.safetensors", metadata=checksums)
    index = {
        "metadata": {
            "version": "000001", "base_version": "000000", "delta_encoding": "xor", "compression_format": "zstd",
            "checksum_format": "adler32",
        },
        "weight_map": dict.fromkeys(saved, "model-00001-of-00001.safetensors"),
    }  # fmt: skip
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def assert_holds(folder: Path, state: Tensors) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name, (array, _) in state.items():
            assert checkpoint.tensors.read(name).tobytes() == array.tobytes(), name
