"""Compress a whole random model of published shapes: what --dry-run says, and the time and memory that it takes.

    python benchmarks/compress_model.py --shape llama-3.1-8b --device cuda --json compress_model.json
    python benchmarks/compress_model.py --shape llama-3.1-8b --scale 32 --layers 2       any machine, small shapes

The weights are random, and so is their change, so time and memory are those of a real model of these shapes, and
fidelity means nothing. The pair takes twice the checkpoint's bytes in --work. Seconds include reading and writing all
files. Options after `--` go to `compress`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from compress_block import SHAPES, Block
from compress_speed import byte_tokenizer, write_text
from harness import Benchmark, Timing, arguments

VOCABULARY: Final = 128_256
_SPREAD, _STEP = 0.02, 0.001  # standard deviations of a weight and of its change


def tensors(block: Block, vocabulary: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of each shard by tensor: the tables and the last norm, then each decoder block."""
    yield {
        "model.embed_tokens.weight": (vocabulary, block.width),
        "lm_head.weight": (vocabulary, block.width),
        "model.norm.weight": (block.width,),
    }
    kv = block.width // block.heads * block.kv_heads
    attention = {"q": (block.width, block.width), "k": (kv, block.width), "v": (kv, block.width)}
    for layer in range(block.layers):
        of = f"model.layers.{layer}"
        yield {
            **{f"{of}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()},
            f"{of}.self_attn.o_proj.weight": (block.width, block.width),
            **{f"{of}.mlp.{name}_proj.weight": (block.mlp_width, block.width) for name in ("gate", "up")},
            f"{of}.mlp.down_proj.weight": (block.width, block.mlp_width),
            f"{of}.input_layernorm.weight": (block.width,),
            f"{of}.post_attention_layernorm.weight": (block.width,),
        }


def write_pair(folder: Path, block: Block, vocabulary: int, device: torch.device) -> tuple[Path, Path]:
    """Write a random Llama and a changed copy in BF16, a shard a block. Returns (base, fine-tuned)."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=block.width,
        intermediate_size=block.mlp_width,
        num_hidden_layers=block.layers,
        num_attention_heads=block.heads,
        num_key_value_heads=block.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=256,
        eos_token_id=257,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    folders = folder / "base", folder / "fine-tuned"
    for path in folders:
        config.save_pretrained(path)
        byte_tokenizer(path)
    draw = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...], spread: float) -> torch.Tensor:
        return spread * torch.randn(shape, generator=draw, device=device)

    places: dict[str, str] = {}
    for number, shapes in enumerate(tensors(block, vocabulary)):
        file = f"model-{number:05}.safetensors"
        base = {name: random(shape, _SPREAD) + (len(shape) == 1) for name, shape in shapes.items()}
        tuned = {name: weight + random(weight.shape, _STEP) for name, weight in base.items()}
        for path, weights in zip(folders, (base, tuned), strict=True):
            save_file({name: weight.bfloat16().cpu() for name, weight in weights.items()}, path / file)
        places |= dict.fromkeys(shapes, file)
    for path in folders:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folders


def one(base: Path, tuned: Path, out: Path, text: Path, device: str, more: list[str]) -> dict[str, Any]:
    """Compress in this process. Returns seconds, processor seconds, and peak bytes of the host and of the device."""
    from peraxis_tools.cli import main as run

    words = ["compress", base, tuned, "-o", out, "--calibration", text, "--device", device, *more]
    sys.argv = ["peraxis-tools", *map(str, words)]
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        run()
    except SystemExit as end:
        if end.code:
            raise
    return {
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "device": torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else 0,
        "bytes": out.stat().st_size,
    }


def _tools(*words: object) -> str:
    command = [sys.executable, "-m", "peraxis_tools", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stdout}{done.stderr}")
    return done.stdout


def _compressed(base: Path, tuned: Path, out: Path, text: Path, device: str, more: list[str]) -> dict[str, Any]:
    """Run `one` in a process of its own, whose peaks are its own too."""
    command = [sys.executable, __file__, "--one", *map(str, (base, tuned, out, text)), device, "--", *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"compress: {done.stdout}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(bench: Benchmark, work: Path, block: Block, vocabulary: int, device: str, more: list[str]) -> None:
    """Write the pair, plan, compress and verify. Raises RuntimeError with the output of a step that fails."""
    base, tuned, text, out = work / "base", work / "fine-tuned", work / "text.jsonl", work / "out.pxd"
    if not (tuned / "model.safetensors.index.json").is_file():
        write_pair(work, block, vocabulary, torch.device(device))
    write_text(text)
    words = [base, tuned, "-o", out, "--calibration", text, "--device", device, *more]
    bench.parameters["dry-run"] = _tools("compress", *words, "--dry-run").splitlines()
    found = _compressed(base, tuned, out, text, device, more)
    smaller = sum(path.stat().st_size for path in tuned.glob("*.safetensors")) / found["bytes"]
    note = f"{smaller:.2f} times smaller, peak {found['rss'] / 1e9:.2f} GB, device {found['device'] / 1e9:.2f} GB"
    bench.add("compress", Timing((found["seconds"],)), note=note, **found)
    begin = time.perf_counter()
    _tools("verify", out, "--base", base)
    bench.add("verify with the base", Timing((time.perf_counter() - begin,)))


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths")
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="the folder of the pair; what is there already is taken")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="options of compress, after --")
    return parser


def main() -> int:
    """Measure, and print the figures and what --dry-run said."""
    options = _parser().parse_args()
    if options.one:
        base, tuned, out, text, device = options.one
        figures = one(Path(base), Path(tuned), Path(out), Path(text), device, options.more)
        sys.stdout.write("\n" + json.dumps(figures) + "\n")
        return 0
    block = SHAPES[options.shape].scaled(options.scale)
    block = dataclasses.replace(block, layers=options.layers or block.layers)
    bench = Benchmark(
        "compress_model",
        parameters={"shape": options.shape, "scale": options.scale, "layers": block.layers, "more": options.more},
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        measure(bench, work, block, max(258, VOCABULARY // options.scale), options.device, options.more)
    bench.finish(options.json, options.plot)
    sys.stdout.write("\n".join(bench.parameters["dry-run"]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
