"""Two processes give the artifact of one, byte for byte, because their sums are exact in any order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peraxis_format as pxd
from peraxis_tools import compress
from tests.processes import run_ranks
from tests.tools.compress_pairs import llama_config, write_pair, write_text
from tests.tools.test_compress_architectures import FAMILIES

# Users start one process per device in this way. Without GPUs accelerate's "GPUs" are processes on the CPU.
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node=2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no "
    "--dynamo_backend=no --main_process_port=0",
}
OPTIONS: dict[str, Any] = {"calibration_samples": 10, "sequence_length": 16, "batch_size": 1}


def compress_on(rank: int, world: int, folder: str, options: dict[str, Any]) -> None:
    """Compress in one of `world` processes, as a launcher would start it. Products depend on the number of threads."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    if world > 1:
        store = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    compress(f"{folder}/base", f"{folder}/tuned", f"{folder}/{world}.pxd", **options)


def compare(one: Path, many: Path) -> None:
    with pxd.open(one) as alone, pxd.open(many) as together:
        assert alone.manifest.modules == together.manifest.modules  # with digests, so that a failure names the module
    assert one.read_bytes() == many.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("few", 4), ("granite-moe", 2)])
def test_several_processes_give_the_artifact_of_one(family: str, count: int, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": count == 3}
    config = llama_config(**tied) if family in ("llama", "few") else FAMILIES[family]()
    assert isinstance(config, transformers.PretrainedConfig)
    write_pair(tmp_path, config, dtype=torch.float32)
    options = {"calibration": str(write_text(tmp_path / "text.jsonl")), **OPTIONS}
    if config.tie_word_embeddings:  # a tied table reads a part of so long a text
        options["calibration_samples"] = 60
    if family == "few":  # fewer batches than processes
        options["batch_size"] = 16
    for world in (1, count):
        run_ranks(compress_on, world, tmp_path, options)
    compare(tmp_path / "1.pxd", tmp_path / f"{count}.pxd")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_that_a_launcher_starts_give_the_artifact_of_one(launcher: str, tmp_path: Path) -> None:
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    base, tuned = write_pair(tmp_path, llama_config(), dtype=torch.float32)
    options = {"calibration": str(write_text(tmp_path / "text.jsonl")), **OPTIONS}
    run_ranks(compress_on, 1, tmp_path, options)
    script = tmp_path / "run.py"
    call = f"compress({str(base)!r}, {str(tuned)!r}, '2.pxd', **{options!r})"
    script.write_text(f"import peraxis_tools\nperaxis_tools.{call}\n", "utf-8")
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1800, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compare(tmp_path / "1.pxd", tmp_path / "2.pxd")
