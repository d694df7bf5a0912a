"""Compare a delta with a LoRA of the same fine-tune at equal bytes: KL and top-1 agreement on held-out text.

    python benchmarks/lora.py BASE FINE_TUNED DELTA --text english=held-out-english.txt

The LoRA is the truncated singular value decomposition of each matrix's true delta, with F16 factors. All matrices have
the same rank, the largest at which the factors and the exact vectors take at most the bytes of the delta's payload.
This is the best approximation of the weights at that rank. A LoRA that is trained from the base is a different
fine-tune.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from baselines.lora import equal_rank, truncated
from harness import Benchmark, Timing, arguments

import peraxis_format as pxd
from peraxis_tools.evaluate.fidelity import compare
from peraxis_tools.evaluate.models import load_checkpoint_model, load_merged, load_tokenizer

__all__ = ["replace_by_lora"]


@torch.no_grad()
def replace_by_lora(base: Any, fine_tuned: Any, rank: int) -> float:
    """Add the truncated deltas to the base in place. Returns the share of the deltas' squared norm that they keep."""
    kept = norm = 0.0
    for old, new in zip(base.parameters(), fine_tuned.parameters(), strict=True):
        if old.ndim != 2:
            old.copy_(new)
            continue
        delta = (new - old).float()
        left, right = truncated(delta, rank)
        product = left.half().float() @ right.half().float()
        norm += float(delta.square().sum())
        kept += float(delta.square().sum() - (delta - product).square().sum())
        # PEFT merges in the same way: the sum is rounded to the checkpoint's dtype.
        old.copy_((old.float() + product).to(torch.bfloat16).to(old.dtype))
    return kept / norm


def main() -> int:
    """Print KL and top-1 agreement of the base, of the LoRA at equal bytes and of the delta for each text."""
    parser = arguments(__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("fine_tuned", type=Path)
    parser.add_argument("delta", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--sequence-length", type=int, default=256)
    options = parser.parse_args()
    with pxd.open(options.delta) as file:
        budget = sum(end - begin for begin, end in map(file.span, file))
    kind: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    reference = load_checkpoint_model(options.fine_tuned, **kind)
    base, lora = (load_checkpoint_model(options.base, **kind) for _ in range(2))
    shapes = [tuple(parameter.shape) for parameter in lora.parameters()]
    vectors = sum(2 * shape[0] for shape in shapes if len(shape) == 1)
    rank = equal_rank([shape for shape in shapes if len(shape) == 2], budget - vectors)
    kept = replace_by_lora(lora, reference, rank)
    candidates = {
        "base": base,
        f"LoRA, rank {rank}": lora,
        "delta": load_merged(options.base, options.delta, **kind),
    }
    bench = Benchmark("lora", parameters={"bytes": budget, "rank": rank, "kept": kept})
    tokenizer = load_tokenizer(options.fine_tuned)
    for text in options.text:
        name, _, path = text.partition("=")
        ids = torch.tensor(tokenizer(Path(path).read_text("utf-8"), verbose=False)["input_ids"])
        length = options.sequence_length
        samples = ids[: len(ids) // length * length].view(-1, length)[: options.samples]
        for label, model in candidates.items():
            begin = time.perf_counter()
            found = compare(reference, model, samples.split(8))
            note = f"KL {found.kl:.4f}, top-1 {found.top1:.1%}"
            bench.add(
                f"{name}: {label}", Timing((time.perf_counter() - begin,)), note=note, kl=found.kl, top1=found.top1
            )
    bench.finish(options.json, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
