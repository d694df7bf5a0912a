"""Write a .pxd of a large model's shapes with random payload, for timings of the tools.

    python benchmarks/make_artifact.py big.pxd --seed 1             # Llama-3.1-8B shapes, all `sign`: 1.0 GB
    python benchmarks/make_artifact.py big2.pxd --like big.pxd --flip 0.02

Payload bytes are random, so nothing can profit from their regularity. The base does not exist: its digests are
made from the names, equal for every file that this script writes, so that such files are of one base.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import peraxis_format as pxd

__all__ = ["LLAMA_8B", "Shapes", "write_artifact", "write_variation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The sizes of a Llama-like model."""

    layers: int
    width: int
    key_value: int
    mlp: int
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in execution order."""
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


def write_artifact(path: Path, *, shapes: Shapes = LLAMA_8B, axis: pxd.Axis = pxd.Axis.ROW_COL, seed: int = 0) -> None:
    """Every matrix one mask, every norm exact."""
    rng = np.random.default_rng(seed)
    identity = pxd.Identity(id="example/random-base")
    with pxd.DeltaWriter(path, base=identity, fine_tuned=pxd.Identity(id=f"example/random-{seed}")) as writer:
        for name, shape in shapes.tensors():
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
    """The same file with about this share of its sign bytes drawn anew."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--axis", choices=[axis.value for axis in pxd.Axis], default="row+col")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--like", type=Path, help="vary this file instead of drawing a new one")
    parser.add_argument("--flip", type=float, default=0.02, help="share of sign bytes drawn anew, with --like")
    options = parser.parse_args()
    if options.like is not None:
        write_variation(options.path, options.like, flip=options.flip, seed=options.seed)
    else:
        write_artifact(options.path, axis=pxd.Axis(options.axis), seed=options.seed)


if __name__ == "__main__":
    main()
