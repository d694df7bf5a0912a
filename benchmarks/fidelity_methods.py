"""The methods that fidelity.py compares: each reads a pair and a text, and writes a PXD file."""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "DISTILL",
    "FIT",
    "LARGE",
    "METHODS",
    "RATIOS",
    "VALIDATE",
    "Inputs",
    "Written",
    "inspected",
    "run_method",
    "tokens",
]

FIT, DISTILL, VALIDATE = 50, 150, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The inputs of every method.

    fit, distill: numbers of samples. work: the folder of each METHOD.pxd. device: torch's name of where a method runs.
    """

    base: Path
    fine_tuned: Path
    calibration: Path
    tuning: Path
    length: int
    work: Path
    fit: int = FIT
    distill: int = DISTILL
    device: str = "cpu"

    @classmethod
    def from_json(cls, text: str) -> Inputs:
        """The inputs from `to_json`."""
        given = json.loads(text)
        paths = {field.name for field in fields(cls) if field.type == "Path"}
        return cls(**{key: Path(value) if key in paths else value for key, value in given.items()})

    def to_json(self) -> str:
        """All fields as a JSON object; paths as strings."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in given.items()})

    def output(self, method: str) -> Path:
        """The file of a method."""
        return self.work / f"{method}.pxd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a method says about its file. bytes, payload: its size, if the file's own size is not meant."""

    note: str = ""
    bytes: int | None = None
    payload: int | None = None


def _bitdelta(inputs: Inputs, output: Path, *, distilled: bool) -> Written:
    from baselines.bitdelta import bitdelta
    from baselines.pair import load_pair, write_pxd

    samples, ids = tokens(inputs)
    pair = load_pair(inputs.base, inputs.fine_tuned, inputs.device)
    write_pxd(output, pair, bitdelta(pair, ids[inputs.fit :] if distilled else None), samples=samples)
    return Written(note="lr 1e-4" if distilled else "")


def _paper(inputs: Inputs, output: Path, *, distilled: bool) -> Written:
    from baselines.pair import load_pair, write_pxd
    from baselines.paper import paper

    samples, ids = tokens(inputs)
    pair = load_pair(inputs.base, inputs.fine_tuned, inputs.device)
    modules = paper(
        pair, ids[: inputs.fit], ids[inputs.fit : inputs.fit + VALIDATE], ids[inputs.fit :] if distilled else None
    )
    write_pxd(output, pair, modules, samples=samples)
    return Written(note="lr 1e-4, 1e-5" + ("; 1e-5" if distilled else ""))


def _paper_tuned(inputs: Inputs, output: Path) -> Written:
    import torch
    from baselines.pair import load_pair, read_samples, write_pxd
    from baselines.tuned import paper_tuned

    samples, ids = tokens(inputs)
    tuning = read_samples(inputs.fine_tuned, inputs.tuning, samples=16, length=inputs.length)
    modules, settings = paper_tuned(
        lambda: load_pair(inputs.base, inputs.fine_tuned, inputs.device),
        ids[: inputs.fit],
        ids[inputs.fit : inputs.fit + VALIDATE],
        ids[inputs.fit :],
        torch.from_numpy(tuning.ids).to(inputs.device),
    )
    write_pxd(output, load_pair(inputs.base, inputs.fine_tuned, inputs.device), modules, samples=samples)
    return Written(note=f"lr {settings.row_lr:g}; {settings.distill_lr:g}")


def _lora(inputs: Inputs, output: Path, *, epochs: int) -> Written:
    from baselines.lora import equal_rank, lora
    from baselines.pair import load_pair

    _, ids = tokens(inputs)
    pair = load_pair(inputs.base, inputs.fine_tuned, inputs.device)
    shapes = [tuple(layer.weight.shape) for _, layer, _ in pair.linears()]
    rank = equal_rank(shapes, sum(rows * columns for rows, columns in shapes) // 8)  # the bytes of one mask
    modules = lora(pair, rank, ids[inputs.fit :] if epochs else None, epochs=epochs)
    stored = sum(2 * rank * sum(shape) for shape in shapes)
    note = f"rank {rank}" + (f", lr 1e-4, epochs {epochs}" if epochs else "")
    return _merged(output, pair, {name: module.rounded() for name, module in modules.items()}, stored, note)


def _delta_come(inputs: Inputs, output: Path) -> Written:
    from baselines.delta_come import delta_come
    from baselines.pair import load_pair

    _, ids = tokens(inputs)
    pair = load_pair(inputs.base, inputs.fine_tuned, inputs.device)
    modules = delta_come(pair, ids[: inputs.fit])
    bases = {name: student.weight.detach() for name, _, student in pair.linears()}
    merged = {name: bases[name] + module.left @ module.right for name, module in modules.items()}
    ranks = sorted(module.left.shape[1] for module in modules.values())
    note = f"rank {ranks[0]} to {ranks[-1]}, 8 + 3 + 2 bits"
    return _merged(output, pair, merged, sum(module.bytes for module in modules.values()), note)


def _merged(output: Path, pair: Any, merged: Mapping[str, Any], stored: int, note: str) -> Written:
    """Write merged weights exactly, so that all methods are evaluated by the same code; count `stored` bytes instead.

    merged: float32 [d_out, d_in] by the name of the layer. The file has them in two bytes a weight.
    """
    from baselines.pair import write_pxd

    write_pxd(output, pair, {}, merged=merged)
    replaced = sum(2 * weight.numel() for weight in merged.values()) - stored
    found = inspected(output)
    payload = sum(line.bytes for line in found.modules) - replaced
    return Written(note=note, bytes=found.bytes - replaced, payload=payload)


def tokens(inputs: Inputs) -> tuple[Any, Any]:
    """(the samples, their ids [fit + distill, length]): the samples that `compress` fits and distils on."""
    import torch
    from baselines.pair import read_samples

    samples = read_samples(
        inputs.fine_tuned, inputs.calibration, samples=inputs.fit + inputs.distill, length=inputs.length
    )
    return samples, torch.from_numpy(samples.ids).to(inputs.device)


def _ours(inputs: Inputs, output: Path, **options: Any) -> Written:
    from peraxis_tools.compress import compress

    # Sizes in terms of what an earlier method wrote.
    if "half_of" in options:
        options["target_size"] = _half(inputs.output(options.pop("half_of")))
    if "size_of" in options:
        options["target_size"] = inputs.output(options.pop("size_of")).stat().st_size
    result = compress(
        inputs.base,
        inputs.fine_tuned,
        output,
        calibration=str(inputs.calibration),
        calibration_samples=inputs.fit,
        sequence_length=inputs.length,
        device=inputs.device,
        overwrite=True,
        **options,
    )
    return Written(note=", ".join(f"{count} {axis}" for axis, count in result.axis_counts.items()))


def _distilled(inputs: Inputs) -> dict[str, Any]:
    """Options of a distillation on the calibration text alone."""
    return {"distill_samples": inputs.distill}


def _half(path: Path) -> int:
    """The size of a file with half the payload of this one: header and assets cannot be halved."""
    found = inspected(path)
    return found.bytes - sum(line.bytes for line in found.modules) // 2


def inspected(path: Path) -> Any:
    from peraxis_tools.inspect import inspect

    return inspect(path)


# A label, and a function that writes the file.
Method = tuple[str, Callable[[Inputs, Path], Written]]
# As many steps on the text of the others as `best` takes on its own.
_SAME_TEXT = {"recipe": "best", "distill_samples": DISTILL, "generated_samples": 2 * DISTILL, "distill_epochs": 16}
_SCALAR = {"fit": "closed-form", "axis": "tensor", "embeddings": "full", "generated_samples": 0}
_ONE_AXIS = {"axis": "col", "embeddings": "full"}
# So much text that no sample is seen often enough to be learnt by heart.
_LONG = {"distill_samples": 2950, "generated_samples": 3000, "held_out": 0.05, "distill_epochs": 6, "axis": "row"}
# In this order, because later methods read the sizes of earlier ones. "one axis": one vector a module, like the paper.
# The second group is for models of 100 M parameters and more: the papers' own loops take hours there.
# The third is one curve: the whole file so many times smaller than the checkpoint.
LARGE = (
    "lora-svd",
    "lora-brief",
    "lora",
    "delta-come",
    "scalar",
    "scalar-distilled",
    "adamw",
    "free",
    "default",
    "default-distilled",
    "ratio-12-distilled",
)
RATIOS = {f"ratio-{ratio}": ratio for ratio in (4, 6, 8, 12, 16, 24)}
METHODS: Mapping[str, Method] = {
    "bitdelta-init": ("BitDelta, no distillation", lambda i, o: _bitdelta(i, o, distilled=False)),
    "bitdelta": ("BitDelta", lambda i, o: _bitdelta(i, o, distilled=True)),
    "paper-fit": ("paper, no distillation", lambda i, o: _paper(i, o, distilled=False)),
    "paper": ("paper", lambda i, o: _paper(i, o, distilled=True)),
    "paper-tuned": ("paper, rates tuned", _paper_tuned),
    "lora-svd": ("LoRA of the bytes of one mask, no training", lambda i, o: _lora(i, o, epochs=0)),
    "lora-brief": ("LoRA of the bytes of one mask, one epoch", lambda i, o: _lora(i, o, epochs=1)),
    "lora": ("LoRA of the bytes of one mask, five epochs", lambda i, o: _lora(i, o, epochs=5)),
    "delta-come": ("Delta-CoMe of the bytes of one mask", _delta_come),
    "scalar": ("one closed-form scale", lambda i, o: _ours(i, o, **_SCALAR)),
    "scalar-distilled": ("one closed-form scale, distilled", lambda i, o: _ours(i, o, **_SCALAR, **_distilled(i))),
    "adamw": ("paper, by --fit adamw", lambda i, o: _ours(i, o, fit="adamw", embeddings="full", **_distilled(i))),
    "closed-form": ("closed form", lambda i, o: _ours(i, o, fit="closed-form", embeddings="full")),
    "refined": ("refined", lambda i, o: _ours(i, o, fit="refined", embeddings="full")),
    "scales": ("refined, scales distilled", lambda i, o: _ours(i, o, embeddings="full", distill_samples=i.distill)),
    "distilled": ("recipe distilled", lambda i, o: _ours(i, o, embeddings="full", recipe="distilled")),
    "same-text": ("recipe best on 200 samples, one axis", lambda i, o: _ours(i, o, **_ONE_AXIS, **_SAME_TEXT)),
    "best": ("recipe best, one axis", lambda i, o: _ours(i, o, recipe="best", **_ONE_AXIS)),
    "long": ("recipe best on 6000 samples", lambda i, o: _ours(i, o, recipe="best", embeddings="full", **_LONG)),
    "default": ("all tensors, the default", _ours),
    "default-distilled": ("all tensors, scales distilled", lambda i, o: _ours(i, o, distill_samples=i.distill)),
    "half": ("all tensors, half the bytes", lambda i, o: _ours(i, o, half_of="best", recipe="best")),
    "budget": ("the paper's bytes, spent freely", lambda i, o: _ours(i, o, size_of="paper", recipe="best")),
    "free": ("the bytes of one scale, spent freely", lambda i, o: _ours(i, o, size_of="scalar")),
    **{name: (f"{ratio} times smaller", partial(_ours, target_ratio=ratio)) for name, ratio in RATIOS.items()},
    "ratio-12-distilled": (
        "12 times smaller, distilled",
        lambda i, o: _ours(i, o, target_ratio=12, distill_samples=i.distill),
    ),
}


def run_method(method: str, inputs: Inputs, *, methods: Mapping[str, Method] = METHODS) -> dict[str, Any]:
    """Run one method in this process.

    Returns wall and processor seconds and peak bytes of the host and of the device. idle_rss: the host's peak before.
    """
    import datasets  # noqa: F401  what every method imports is no method's time
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peraxis_tools.ops.sign_search.numba  # noqa: F401  compiled on import

    AutoTokenizer.from_pretrained(inputs.fine_tuned)
    AutoModelForCausalLM.from_pretrained(inputs.fine_tuned)
    device = torch.device(inputs.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.zeros(1, device=device)  # the start of the device is no method's time either
    gc.collect()
    gc.freeze()  # nor is looking through what they left
    before = _peak()
    begin, cpu = time.perf_counter(), time.process_time()
    written = methods[method][1](inputs, inputs.output(method))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": seconds, "cpu": cpu, "rss": _peak(), "idle_rss": before, "device": held, **asdict(written)}


def _peak() -> int:
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
