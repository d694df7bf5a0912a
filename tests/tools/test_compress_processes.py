"""Two processes give the artifact of one, byte for byte, because their sums are exact in any order."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import peraxis_format as pxd
from tests.tools.compress_pairs import llama_config, write_pair, write_text
from tests.tools.test_compress_architectures import FAMILIES

# Users start one process per device in this way. Without GPUs accelerate's "GPUs" are processes on the CPU.
LAUNCHERS: dict[str, Callable[[int], list[str]]] = {
    "torchrun": lambda count: ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"],
    "accelerate": lambda count: [
        *("-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={count}", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={_free_port()}"),
    ],
}
OPTIONS = {"calibration_samples": 10, "sequence_length": 16, "batch_size": 1}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def script(path: Path, base: Path, tuned: Path, output: Path, **options: object) -> Path:
    path.write_text(
        "import peraxis_tools\n"
        f"peraxis_tools.compress({str(base)!r}, {str(tuned)!r}, {str(output)!r}, **{options!r})\n",
        "utf-8",
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "count", "launcher"),
    [
        ("llama", 2, "torchrun"),
        ("llama", 3, "torchrun"),
        ("few", 4, "torchrun"),
        ("granite-moe", 2, "torchrun"),
        ("llama", 2, "accelerate"),
    ],
)
def test_several_processes_give_the_artifact_of_one(family: str, count: int, launcher: str, tmp_path: Path) -> None:
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    tied = {"tie_word_embeddings": count == 3}
    config = llama_config(**tied) if family in ("llama", "few") else FAMILIES[family]()
    assert isinstance(config, transformers.PretrainedConfig)
    base, tuned = write_pair(tmp_path, config, dtype=torch.float32)
    options = {"calibration": str(write_text(tmp_path / "text.jsonl")), **OPTIONS}
    if config.tie_word_embeddings:  # a tied table reads a part of so long a text
        options["calibration_samples"] = 60
    if family == "few":  # fewer batches than processes
        options["batch_size"] = 16
    # Products depend on the number of threads, as in torch, so all processes have the same number.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for processes in (1, count):
        output = tmp_path / f"{processes}.pxd"
        launch = LAUNCHERS[launcher](count) if processes > 1 else []
        command = [sys.executable, *launch, str(script(tmp_path / "run.py", base, tuned, output, **options))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    with pxd.open(tmp_path / "1.pxd") as one, pxd.open(tmp_path / f"{count}.pxd") as many:
        assert one.manifest.modules == many.manifest.modules  # with digests, so that a failure names the module
    assert (tmp_path / "1.pxd").read_bytes() == (tmp_path / f"{count}.pxd").read_bytes()
