"""Measure time and peak memory of compression beside the paper's procedure and as the model gets deeper.

    python benchmarks/compress_speed.py BASE FINE_TUNED --calibration train.jsonl --json compress_speed.json
    python benchmarks/compress_speed.py --depths 2,4,8,16 --json depth.json           # random Llamas, no pair needed
    python benchmarks/compress_speed.py --block llama-3.1-8b --length 512             # one block, step by step

On a pair, `compress` (closed form; refined; no distillation) and the paper's procedure (benchmarks/baselines/paper.py)
run on the same 50 samples, in turns, each in its own process with one thread. Seconds are CPU seconds that include
loading the models and writing the file, but not the imports. The paper's forward passes run one sample at a time, as
published; `batched` runs them in the same batches of 8 as `compress`. --depths measures random Llamas of one width.
Peak memory is that of the process; `work` is the part that the method added after the imports. For --block see
compress_block.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fidelity_methods import FIT, METHODS, VALIDATE, Inputs, Written, run_method, tokens
from harness import Benchmark, Result, Timing, arguments

__all__ = ["byte_tokenizer", "main", "write_deep_pair", "write_text"]

_WORDS = "the model reads one line after the other and says what comes next in it"
_SEED: Final = 0  # of the random weights


def write_deep_pair(folder: Path, layers: int, *, width: int) -> tuple[Path, Path]:
    """Write a random Llama and a slightly changed copy, with a byte tokenizer. Returns (base, fine-tuned)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(_SEED)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folders = folder / f"base-{layers}", folder / f"tuned-{layers}"
    model.save_pretrained(folders[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0)
    model.save_pretrained(folders[1])
    for path in folders:
        byte_tokenizer(path)
    return folders


def byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token for each byte, <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_text(path: Path) -> Path:
    """Write 200 documents of 400 random words each. Returns the path."""
    import random

    draw = random.Random(0)
    documents = [" ".join(draw.choices(_WORDS.split(), k=400)) for _ in range(200)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), "utf-8")
    return path


def _batched(inputs: Inputs, output: Path) -> Written:
    """Run the paper's procedure without distillation, with forward passes in batches of 8."""
    from baselines.pair import load_pair, write_pxd
    from baselines.paper import PaperSettings, paper

    samples, ids = tokens(inputs)
    pair = load_pair(inputs.base, inputs.fine_tuned)
    fit, validate = ids[:FIT], ids[FIT : FIT + VALIDATE]
    write_pxd(output, pair, paper(pair, fit, validate, None, settings=PaperSettings(batch=8)), samples=samples)
    return Written(note="forward passes in batches of 8")


STEPS: Mapping[str, str] = {
    "closed-form": "ours, closed form",
    "refined": "ours, refined",
    "paper-fit": "paper, per-module fits alone",
    "paper-batched": "paper, per-module fits, batched",
    "paper": "paper, with its distillation",
}


def _run(step: str, inputs: Inputs) -> dict[str, Any]:
    """Run one step in its own process. Raises RuntimeError with the last line of its errors if it fails."""
    command = [sys.executable, __file__, "--one", step, "--inputs", inputs.to_json()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{step}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _record(bench: Benchmark, label: str, runs: list[dict[str, Any]], against: Result | None, **extra: Any) -> Result:
    peak, work = (max(values) for values in zip(*((r["rss"], r["rss"] - r["idle_rss"]) for r in runs), strict=True))
    return bench.add(
        label,
        Timing(tuple(run["cpu"] for run in runs)),
        against=against,
        note=f"peak {peak / 1e6:.0f} MB, work {work / 1e6:.0f} MB",
        wall=[run["seconds"] for run in runs],
        peak=peak,
        work=work,
        **extra,
    )


def on_a_pair(bench: Benchmark, inputs: Inputs, steps: list[str], *, repeat: int) -> None:
    """Run every step `repeat` times, in turns. ratio: speed divided by that of the paper's per-module fits."""
    runs: dict[str, list[dict[str, Any]]] = {step: [] for step in steps}
    for _ in range(repeat):
        for step in steps:
            runs[step].append(_run(step, inputs))
    paper = None
    if "paper-fit" in steps:
        paper = _record(bench, STEPS["paper-fit"], runs["paper-fit"], None)
    for step in steps:
        if step != "paper-fit":
            _record(bench, STEPS[step], runs[step], paper)


def by_depth(bench: Benchmark, work: Path, depths: list[int], *, width: int, length: int, repeat: int) -> None:
    """Run our refined fit on random Llamas of these depths. ratio: speed divided by that of the first depth."""
    text = write_text(work / "text.jsonl")
    inputs = {}
    for layers in depths:
        base, tuned = write_deep_pair(work, layers, width=width)
        inputs[layers] = Inputs(base=base, fine_tuned=tuned, calibration=text, tuning=text, length=length, work=work)
    runs: dict[int, list[dict[str, Any]]] = {layers: [] for layers in depths}
    for _ in range(repeat):
        for layers in depths:
            runs[layers].append(_run("refined", inputs[layers]))
    first = None
    for layers in depths:
        per_layer = min(run["cpu"] for run in runs[layers]) / layers
        result = _record(bench, f"{layers} layers", runs[layers], first, layers=layers, seconds_per_layer=per_layer)
        first = first or result


def block(options: argparse.Namespace) -> int:
    """Time one block of the given shapes on one device."""
    import torch
    from compress_block import SHAPES, one_block

    from peraxis_tools.checkpoints.environment import resolve_device

    device = resolve_device(options.device)
    dtype = getattr(torch, options.compute_dtype)
    shapes = SHAPES[options.block].scaled(options.scale)
    parameters = {"block": options.block, "scale": options.scale, "samples": FIT, "length": options.length}
    bench = Benchmark(
        "compress_block", parameters={**parameters, "dtype": str(dtype), "threads": torch.get_num_threads()}
    )
    one_block(bench, shapes, samples=FIT, length=options.length, device=device, dtype=dtype, repeat=options.repeat)
    bench.finish(options.json, options.plot)
    return 0


def main() -> int:
    """Run one of the three benchmarks."""
    parser = arguments(__doc__)
    parser.set_defaults(repeat=3)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("fine_tuned", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated steps of the run on a pair")
    parser.add_argument("--depths", help="layers of random Llamas, comma-separated")
    parser.add_argument("--width", type=int, default=256, help="hidden size of the random Llamas")
    parser.add_argument("--length", type=int, default=256, help="tokens per sample")
    parser.add_argument("--block", help="shapes of one block: llama-3.1-8b or llama-3.2-1b")
    parser.add_argument("--scale", type=int, default=1, help="divide the widths of the block")
    parser.add_argument("--device", default="auto", help="device of the block")
    parser.add_argument("--compute-dtype", default="float32", help="dtype of the block's forward passes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        inputs = Inputs.from_json(options.inputs)
        methods = {**METHODS, "paper-batched": (STEPS["paper-batched"], _batched)}
        sys.stdout.write(json.dumps(run_method(options.one, inputs, methods=methods)) + "\n")
        return 0
    if options.block:
        return block(options)
    bench = Benchmark("compress_speed", parameters={"fit": FIT, "length": options.length, "width": options.width})
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if options.depths:
            depths = [int(depth) for depth in options.depths.split(",")]
            by_depth(bench, work, depths, width=options.width, length=options.length, repeat=options.repeat)
        elif options.fine_tuned is None or options.calibration is None:
            parser.error("give BASE FINE_TUNED --calibration FILE, or --depths 2,4,8,16")
        else:
            inputs = Inputs(
                base=options.base,
                fine_tuned=options.fine_tuned,
                calibration=options.calibration,
                tuning=options.calibration,
                length=options.length,
                work=work,
            )
            on_a_pair(bench, inputs, options.steps.split(","), repeat=options.repeat)
    bench.finish(options.json, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
