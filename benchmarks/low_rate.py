"""Measure deltas of fine-tunes at low learning rates, in which most weights equal the base bit for bit.

    python benchmarks/low_rate.py BASE --train new.txt --text held-out.txt --calibration train.jsonl

Each rate trains a fine-tune of BASE with AdamW on BF16 weights, which is common if memory is short. Steps below half a
unit in the last place are lost, so a share of the deltas is exactly zero. The benchmark checks that our delta is better
than no delta for every linear of every block. The error on held-out text is

    error(W) = mean over tokens of |X_t W_f^T - X W^T|^2 / |X_t W_f^T|^2

X: inputs of the linear in our compressed model; X_t: its inputs in the fine-tuned model. W is our weight, the base's
(`same`) or BitDelta's (one scalar, mean |delta|), rounded to BF16 as in a merged checkpoint. The time is that of our
compression.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness import Benchmark, Timing, arguments

__all__ = ["ModuleErrors", "fine_tune", "main", "module_errors"]

_BATCH: Final = 8  # samples in a step


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleErrors:
    """Relative output errors of one linear. zeros: share of zero deltas. kept: our delta keeps the base's weight."""

    name: str
    ours: float
    same: float
    bitdelta: float
    zeros: float
    kept: bool

    @property
    def fine(self) -> bool:
        """Whether our error is below that of the base and of one scalar, or our delta keeps the base's weight."""
        return self.kept or (self.ours < self.same and self.ours < self.bitdelta)


def fine_tune(base: Path, output: Path, ids: Any, *, rate: float, steps: int, length: int = 128) -> None:
    """Train every parameter of a checkpoint in BF16 and write the result to `output`. ids: int64 [tokens]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (_BATCH, 1), generator=generator)
        sample = ids[starts + torch.arange(length)]
        model(input_ids=sample, labels=sample).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(base).save_pretrained(output)


def module_errors(base: Path, tuned: Path, delta: Path, ids: Any) -> Iterator[ModuleErrors]:
    """Yield the errors of every linear of the blocks. ids: int64 [samples, length]."""
    import torch
    from baselines.pair import SignedLinear, load_pair

    import peraxis_format as pxd
    from peraxis_tools.load import load_model

    pair = load_pair(base, tuned)
    ours = load_model(base, delta, dtype=torch.float32)
    with pxd.open(delta) as file:
        encodings = {module.name: module.encoding for module in file.manifest.modules}
    with torch.no_grad():
        for name, teacher, plain in pair.linears():
            linear = ours.get_submodule(name)
            x, target = _inputs(ours, linear, ids), _inputs(pair.teacher, teacher, ids) @ teacher.weight.t()
            scalar = SignedLinear.of(name, plain.weight, teacher.weight, pxd.Axis.TENSOR).weight()

            def error(weight: Any, x: Any = x, target: Any = target) -> float:
                rest = target - x @ weight.to(torch.bfloat16).float().t()
                return float(rest.square().sum() / target.square().sum())

            yield ModuleErrors(
                name=name,
                ours=error(linear.weight),
                same=error(plain.weight),
                bitdelta=error(scalar),
                zeros=float((plain.weight == teacher.weight).float().mean()),
                kept=encodings[f"{name}.weight"] is pxd.Encoding.SAME,
            )


def _inputs(model: Any, layer: Any, ids: Any) -> Any:
    """Return the inputs of a layer: float32 [tokens, width]."""
    seen: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _run(base: Path, texts: Mapping[str, Any], calibration: str, rate: float, steps: int, work: Path) -> dict[str, Any]:
    from peraxis_tools.compress import compress

    tuned, delta = work / f"tuned-{rate:g}", work / f"{rate:g}.pxd"
    fine_tune(base, tuned, texts["train"], rate=rate, steps=steps)
    begin = time.perf_counter()
    compress(base, tuned, delta, calibration=calibration, sequence_length=256)
    seconds = time.perf_counter() - begin
    modules = list(module_errors(base, tuned, delta, texts["text"]))
    changed = [module for module in modules if module.zeros < 1.0]
    signed = [module for module in changed if not module.kept]
    return {
        "rate": rate,
        "seconds": seconds,
        "zeros": sum(module.zeros for module in modules) / len(modules),
        "modules": len(changed),
        "fine": sum(module.fine for module in changed),
        "kept": len(changed) - len(signed),
        "against_same": max((module.ours / module.same for module in signed), default=0.0),
        "against_bitdelta": max((module.ours / module.bitdelta for module in signed), default=0.0),
    }


def main() -> int:
    """Train, compress and compare at each rate. Returns 1 if a module is worse than the base or than one scalar."""
    import torch
    from transformers import AutoTokenizer

    parser = arguments(__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="text to fine-tune on")
    parser.add_argument("--text", type=Path, required=True, help="held-out text to measure on")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--rates", default="1e-6,3e-6,1e-5,3e-5,1e-4")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)

    def tokens(path: Path, limit: int) -> Any:
        return torch.tensor(tokenizer(path.read_text("utf-8")[:limit], verbose=False)["input_ids"])

    held_out = tokens(options.text, 60_000)
    texts = {"train": tokens(options.train, 400_000), "text": held_out[: len(held_out) // 256 * 256].view(-1, 256)[:32]}
    bench = Benchmark("low_rate", parameters={"base": options.base.name, "steps": options.steps})
    fine = True
    with tempfile.TemporaryDirectory() as temporary:
        for rate in map(float, options.rates.split(",")):
            found = _run(options.base, texts, options.calibration, rate, options.steps, Path(temporary))
            fine = fine and found["fine"] == found["modules"]
            note = (
                f"{100 * found['zeros']:.1f}% zero; {found['fine']} of {found['modules']} fine, {found['kept']} kept; "
                f"worst {found['against_same']:.2f} of same, {found['against_bitdelta']:.2f} of one scalar"
            )
            bench.add(f"rate {rate:g}", Timing((found["seconds"],)), note=note, **found)
    bench.finish(options.json, options.plot)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
