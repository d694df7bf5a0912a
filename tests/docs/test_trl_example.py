"""examples/trl_publish.py: a real GRPO run of TRL on the CPU, and a server that follows it in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install trl")

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_publish.py"


def start(role: str, base: Path, chain: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), role, str(base), str(chain), "4"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_server_follows_a_grpo_run_of_trl(workspace: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from peraxis_format.ops.tensors import storage_array
    from peraxis_format.torch.updates import follow
    from peraxis_tools.apply import apply
    from peraxis_tools.chain import log
    from peraxis_tools.checkpoints.checkpoint import open_checkpoint

    base, chain = workspace / "base", tmp_path / "chain"
    server, trainer = start("serve", base, chain), start("train", base, chain)
    try:
        said, _ = trainer.communicate(timeout=1800)
        assert trainer.returncode == 0, said[-2000:]
        said, _ = server.communicate(timeout=600)
        assert server.returncode == 0, said[-2000:]
    finally:
        trainer.kill()
        server.kill()
    assert "serving step 2" in said
    entries = log(chain).updates
    assert [entry.name for entry in entries] == ["anchor-00000000.pxd", "step-00000001.pxd", "step-00000002.pxd"]
    assert all(entry.changed for entry in entries[1:])
    # A live model that follows has the bits that the tools write.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert follow(model, chain).poll().step == 2
    apply(base, [chain / entry.name for entry in entries], tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as out:
        written = {name: out.tensors.read(name).tobytes() for name in out.tensors}
    live = {name: storage_array(tensor.contiguous()).tobytes() for name, tensor in model.state_dict().items()}
    assert {name: live[name] for name in written} == written
