"""benchmarks/real_pair.py makes the pair of docs/figures.md: here from a small base instead of the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tools.compress_pairs import llama_pair

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_pair.py"


@pytest.mark.slow
def test_a_pair_is_trained_on_a_part_of_each_text_and_what_is_held_out_is_in_files(tmp_path: Path) -> None:
    base, _, _ = llama_pair(tmp_path / "small")
    rows = [{"prompt": f"{i} ", "response": "what is held out is not read " * 8} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "whole.txt").write_text("the words of a text in one piece " * 2000)
    (tmp_path / "c4.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(700)))
    command = [
        *(sys.executable, str(SCRIPT), str(tmp_path / "pair"), "--base", str(base), "--steps", "4"),
        *("--text", f"rows={tmp_path / 'rows.jsonl'}", "--text", f"whole={tmp_path / 'whole.txt'}"),
        *("--calibration", str(tmp_path / "c4.jsonl")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    counts = {path.stem: len(path.read_text().splitlines()) for path in (tmp_path / "pair").glob("*.jsonl")}
    assert counts == {"calibration": 600, "held-out-c4": 100, "held-out-rows": 15, "held-out-whole": 7}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "pair" / "fine-tuned"))
    assert before.keys() == after.keys()
    assert all(value.dtype is torch.bfloat16 for value in after.values())
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2
