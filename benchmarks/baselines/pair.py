"""The pair of models in memory, the modules that the baselines compress, and the file that they write.

A signed linear is  W = W_b + S o B  with  B = sign(W_f - W_b), where the sign of 0 is +1. S >= 0 is a scalar, a vector
[d_out, 1] (row) or a vector [1, d_in] (col). Embeddings, lm_head, norms and biases stay exact, as in both papers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import peraxis_format as pxd
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.checkpoints.kinds import execution_key, layer_of
from peraxis_tools.compress.plan.pairing import tied_pairs
from peraxis_tools.evaluate.models import load_checkpoint_model, load_tokenizer
from peraxis_tools.process.quiet import quiet_transformers
from peraxis_tools.texts.samples import Samples, load_samples

__all__ = ["Pair", "SignedLinear", "load_pair", "read_samples", "write_pxd"]

_SEED: Final = 0  # of the order of documents


@dataclass(slots=True)
class SignedLinear:
    """One module. base and signs (+1, -1): float32 [d_out, d_in]. scale: float32 [], [d_out, 1] or [1, d_in]."""

    name: str
    base: Tensor
    signs: Tensor
    axis: pxd.Axis
    scale: Tensor

    @classmethod
    def of(cls, name: str, base: Tensor, fine_tuned: Tensor, axis: pxd.Axis) -> SignedLinear:
        """Return the module with the signs of the delta and its mean magnitudes along the axis as scales."""
        delta = fine_tuned - base
        size = delta.abs()
        means = {
            pxd.Axis.ROW: lambda: size.mean(dim=1, keepdim=True),
            pxd.Axis.COL: lambda: size.mean(dim=0, keepdim=True),
            pxd.Axis.TENSOR: size.mean,
        }
        return cls(name, base, torch.where(delta >= 0, 1.0, -1.0), axis, means[axis]().detach().clone())

    def parameters(self) -> list[Tensor]:
        """The scale."""
        return [self.scale]

    def weight(self) -> Tensor:
        """Return the weight, float32 [d_out, d_in], differentiable with respect to `scale`."""
        return self.base + self.scale * self.signs


@dataclass(frozen=True, slots=True)
class Pair:
    """teacher: the fine-tuned model. student: the same model with the linears of the base."""

    base: Path
    fine_tuned: Path
    teacher: nn.Module
    student: nn.Module

    def linears(self) -> Iterator[tuple[str, nn.Linear, nn.Linear]]:
        """Yield (name, teacher's linear, student's linear) of the decoder blocks in execution order."""
        names = [n for n, m in self.student.named_modules() if isinstance(m, nn.Linear) and layer_of(n) is not None]
        for name in sorted(names, key=execution_key):
            yield name, self.teacher.get_submodule(name), self.student.get_submodule(name)  # type: ignore[misc]


def load_pair(base: Path, fine_tuned: Path, device: str = "cpu") -> Pair:
    """Load both models in float32 on a device. The student has the exact tensors of the fine-tune from the start."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device(device)}
    with quiet_transformers():
        pair = Pair(
            base,
            fine_tuned,
            load_checkpoint_model(fine_tuned, **options),
            load_checkpoint_model(base, **options),
        )
    signed = {f"{name}.weight" for name, _, _ in pair.linears()}
    theirs = dict(pair.teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in pair.student.named_parameters():
            if name not in signed:
                parameter.copy_(theirs[name])
    for model in (pair.teacher, pair.student):
        model.requires_grad_(False)
    return pair


def read_samples(fine_tuned: Path, source: Path, *, samples: int, length: int) -> Samples:
    """Read samples with the code of `compress`: the first 50 of 150 samples are those that `compress` fits on."""
    return load_samples(str(source), load_tokenizer(fine_tuned), samples=samples, length=length, seed=_SEED)


def write_pxd(
    path: Path,
    pair: Pair,
    modules: Mapping[str, SignedLinear],
    *,
    merged: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
) -> pxd.Manifest:
    """Write one sign component for each of `modules` (layer name -> module) and all other tensors exactly.

    merged: float32 weights that replace the fine-tune's, by the name of the layer; they are rounded to its dtype.
    """
    with open_checkpoint(pair.base) as base, open_checkpoint(pair.fine_tuned) as tuned:
        calibration = None
        if samples is not None:
            count, length = samples.ids.shape
            calibration = pxd.Calibration(
                digest=samples.digest, samples=count, seed=samples.seed, sequence_length=length, source=samples.source
            )
        with pxd.DeltaWriter(path, base=base.identity, fine_tuned=tuned.identity, calibration=calibration) as writer:
            tied = tied_pairs(tuned.tensors)
            aliases = {alias for _, alias in tied}
            for name in sorted(tuned.tensors, key=execution_key):
                if name not in aliases:
                    layer = name.removesuffix(".weight")
                    replaced = None if merged is None else merged.get(layer)
                    writer.add(_module(name, base.tensors, tuned.tensors, modules.get(layer), replaced))
            for pair_of_names in tied:
                writer.tie(*pair_of_names)
            for asset, data in tuned.assets():
                writer.add_asset(asset, data)
            return writer.finish()


def _module(
    name: str, base: pxd.Safetensors, tuned: pxd.Safetensors, signed: SignedLinear | None, merged: Tensor | None
) -> pxd.ModuleDelta:
    info = tuned[name]
    ref = None
    if name in base:
        ref = pxd.BaseRef(dtype=base[name].dtype, shape=base[name].shape, sha256=base.sha256(name))
    if signed is None:
        full = tuned.read(name) if merged is None else pxd.from_float32(merged.detach().cpu().numpy(), info.dtype)
        return pxd.ModuleDelta(
            name=name, shape=info.shape, dtype=info.dtype, encoding=pxd.Encoding.FULL, base=ref, full=full
        )
    return pxd.ModuleDelta(
        name=name,
        shape=info.shape,
        dtype=info.dtype,
        encoding=pxd.Encoding.SIGN,
        base=ref,
        components=(_component(signed),),
    )


def _component(signed: SignedLinear) -> pxd.Component:
    scale = signed.scale.detach().double().reshape(-1).cpu()
    # The scales of the format are not negative (SPEC 5.4), so a negative scale flips the signs of its row or column.
    signs = signed.signs * torch.where(signed.scale.detach() < 0, -1.0, 1.0)
    values, exponent = pxd.encode_scales(np.abs(scale.numpy()))
    field = {pxd.Axis.ROW: "row", pxd.Axis.COL: "col", pxd.Axis.TENSOR: "scalar"}[signed.axis]
    mask = pxd.pack_signs(signs.cpu().numpy() > 0)
    return pxd.Component(axis=signed.axis, exponent=exponent, mask=mask, **{field: values})
