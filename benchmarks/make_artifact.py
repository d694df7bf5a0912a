"""Write a .pxd file with the shapes of a large model and a random payload, for timings of the tools.

    python benchmarks/make_artifact.py big.pxd --seed 1             # Llama-3.1-8B shapes, matrices `sign`: 1.0 GB
    python benchmarks/make_artifact.py big2.pxd --like big.pxd --flip 0.02
    python benchmarks/make_artifact.py folder --checkpoints         # folder/base and folder/fine-tuned: 16 GB each
    python benchmarks/make_artifact.py diff.pt --bitdelta           # BitDelta's layout for that base: 0.9 GB

Payload bytes are random, so no tool can profit from regularity. The base of the first two files does not exist: its
digests are made from the names, so that all such files have the same base. The weights of the checkpoints have
magnitudes of 0.008 to 0.03; those of the fine-tune differ from the base in the last two bits.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import peraxis_format as pxd
from peraxis_tools.checkpoints.shards import TensorSpec, plan_shards, shard_header, write_index

__all__ = ["LLAMA_8B", "Shapes", "write_artifact", "write_bitdelta", "write_checkpoints", "write_variation"]

_PIECE = 1 << 24  # weights written at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The sizes of a Llama-like model."""

    layers: int
    width: int
    key_value: int
    mlp: int
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes in execution order."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (self.width,)
            for name, rows in (("q", self.width), ("k", self.key_value), ("v", self.key_value), ("o", self.width)):
                yield f"{layer}.self_attn.{name}_proj.weight", (rows, self.width)
            yield f"{layer}.post_attention_layernorm.weight", (self.width,)
            yield f"{layer}.mlp.gate_proj.weight", (self.mlp, self.width)
            yield f"{layer}.mlp.up_proj.weight", (self.mlp, self.width)
            yield f"{layer}.mlp.down_proj.weight", (self.width, self.mlp)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocabulary, self.width)


LLAMA_8B = Shapes(layers=32, width=4096, key_value=1024, mlp=14336, vocabulary=128256)


def _base_ref(name: str, shape: tuple[int, ...]) -> pxd.BaseRef:
    return pxd.BaseRef(dtype=pxd.DType.BF16, shape=shape, sha256=hashlib.sha256(name.encode()).hexdigest())


def _scales(rng: np.random.Generator, count: int) -> tuple[np.ndarray, int]:
    return pxd.encode_scales(np.exp(rng.normal(np.log(1e-3), 0.2, count)))


def _component(rng: np.random.Generator, axis: pxd.Axis, shape: tuple[int, ...]) -> pxd.Component:
    mask = np.frombuffer(rng.bytes(shape[0] * pxd.mask_width(shape[1])), np.uint8).reshape(shape[0], -1)
    if axis is pxd.Axis.TENSOR:
        scalar, exponent = _scales(rng, 1)
        return pxd.Component(axis=axis, exponent=exponent, mask=mask, scalar=scalar)
    row, row_exponent = _scales(rng, shape[0])
    if axis is pxd.Axis.ROW:
        return pxd.Component(axis=axis, exponent=row_exponent, mask=mask, row=row)
    col, col_exponent = pxd.encode_scales(np.exp(rng.normal(0.0, 0.2, shape[1])))
    if axis is pxd.Axis.COL:
        col, col_exponent = _scales(rng, shape[1])
        return pxd.Component(axis=axis, exponent=col_exponent, mask=mask, col=col)
    return pxd.Component(axis=axis, exponent=row_exponent + col_exponent, mask=mask, row=row, col=col)


def write_artifact(path: Path, *, axis: pxd.Axis = pxd.Axis.ROW_COL, seed: int = 0) -> None:
    """Write a delta with one sign component for every matrix and exact norms."""
    rng = np.random.default_rng(seed)
    identity = pxd.Identity(id="example/random-base")
    with pxd.DeltaWriter(path, base=identity, fine_tuned=pxd.Identity(id=f"example/random-{seed}")) as writer:
        for name, shape in LLAMA_8B.tensors():
            matrix = len(shape) == 2
            writer.add(
                pxd.ModuleDelta(
                    name=name,
                    shape=shape,
                    dtype=pxd.DType.BF16,
                    encoding=pxd.Encoding.SIGN if matrix else pxd.Encoding.FULL,
                    base=_base_ref(name, shape),
                    components=(_component(rng, axis, shape),) if matrix else (),
                    full=None if matrix else rng.integers(0x3F00, 0x3F80, shape, np.uint16),
                )
            )
        writer.finish()


def write_variation(path: Path, like: Path, *, flip: float, seed: int = 0) -> None:
    """Write a copy of `like` with about the share `flip` of its sign bytes replaced by random bytes."""
    rng = np.random.default_rng(seed)
    with (
        pxd.open(like) as source,
        pxd.DeltaWriter(
            path, base=pxd.Identity(id="example/random-base"), fine_tuned=pxd.Identity(id=f"example/variation-{seed}")
        ) as writer,
    ):
        for name in source:
            module = source[name]
            components = []
            for component in module.components:
                mask = component.mask.copy()
                count = int(mask.size * flip)
                mask.reshape(-1)[rng.integers(0, mask.size, count)] = rng.integers(0, 256, count, np.uint8)
                components.append(replace(component, mask=mask))
            writer.add(replace(module, components=tuple(components)))
        writer.finish()


def write_checkpoints(folder: Path, *, seed: int = 0) -> None:
    """Write a base and a fine-tuned checkpoint in BF16, in shards of 5 GB."""
    rng = np.random.Generator(np.random.SFC64(seed))
    specs = [TensorSpec(name, pxd.DType.BF16, shape) for name, shape in LLAMA_8B.tensors()]
    shards = plan_shards(specs, shard_bytes=5_000_000_000)
    folders = [folder / "base", folder / "fine-tuned"]
    for each in folders:
        each.mkdir(parents=True)
        (each / "config.json").write_text(json.dumps(_config(LLAMA_8B), indent=1))
        write_index(each, shards)
    for shard in shards:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(each / shard.file_name, "wb")) for each in folders]
            for file in files:
                file.write(shard_header(shard.tensors))
            for spec in shard.tensors:
                for begin in range(0, math.prod(spec.shape), _PIECE):
                    count = min(_PIECE, math.prod(spec.shape) - begin)
                    # Sign, last exponent bit and mantissa are random; the exponent's other bits are those of 2^-7.
                    base = _bits(rng, count) & np.uint16(0x80FF) | np.uint16(0x3C00)
                    files[0].write(base.tobytes())
                    files[1].write((base ^ (_bits(rng, count) & np.uint16(3))).tobytes())


def _bits(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.bit_generator.random_raw(-(-count // 4)).view(np.uint16)[:count]


def _config(shapes: Shapes) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shapes.width,
        "intermediate_size": shapes.mlp,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.width // 128,
        "num_key_value_heads": shapes.key_value // 128,
        "vocab_size": shapes.vocabulary,
        "torch_dtype": "bfloat16",
    }


def write_bitdelta(path: Path, *, seed: int = 0) -> None:
    """Write a `.pt` file in BitDelta's layout: a mask and a scalar for each projection, and the full norms."""
    import torch

    rng = np.random.Generator(np.random.SFC64(seed))
    saved = {}
    for name, shape in LLAMA_8B.tensors():
        module = name.removesuffix(".weight")
        if "proj" in name:
            words = rng.bit_generator.random_raw(math.prod(shape) // 64).view(np.int32)
            saved[f"{module}.mask"] = torch.from_numpy(words.reshape(shape[1] // 32, shape[0]))
            saved[f"{module}.coeff"] = torch.tensor(float(rng.uniform(5e-5, 2e-4)))
        elif len(shape) == 1:
            saved[name] = torch.ones(shape, dtype=torch.bfloat16)
    torch.save(saved, path)


def main() -> None:
    """Write the file or the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--axis", choices=[axis.value for axis in pxd.Axis], default="row+col")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--like", type=Path, help="write a variation of this file")
    parser.add_argument("--checkpoints", action="store_true", help="write a pair of checkpoints in this folder")
    parser.add_argument("--bitdelta", action="store_true", help="write a .pt file in BitDelta's layout")
    parser.add_argument("--flip", type=float, default=0.02, help="with --like, the share of random sign bytes")
    options = parser.parse_args()
    if options.checkpoints:
        write_checkpoints(options.path, seed=options.seed)
    elif options.bitdelta:
        write_bitdelta(options.path, seed=options.seed)
    elif options.like is not None:
        write_variation(options.path, options.like, flip=options.flip, seed=options.seed)
    else:
        write_artifact(options.path, axis=pxd.Axis(options.axis), seed=options.seed)


if __name__ == "__main__":
    main()
