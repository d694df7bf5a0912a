"""The example of a trainer and a server, both of which are killed, and the callback of a transformers Trainer."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peraxis_format.torch.updates import follow, list_updates

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_loop.py"
PATIENCE = 600  # seconds; a process takes about 15 of them


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])}
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def killed_at(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    """Run a process and kill it as soon as this step is published."""
    update, end = folder / f"step-{step:08d}.pxd", time.monotonic() + PATIENCE
    while time.monotonic() < end and not update.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert update.exists()


@pytest.mark.slow
def test_trainer_and_server_are_killed_and_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    trainer, server = start("trainer", str(folder), "--steps", "6"), start("server", str(folder), "--until", "99")
    killed_at(folder, trainer, 2)
    killed_at(folder, server, 2)
    server = start("server", str(folder), "--until", "6")
    trainer = start("trainer", str(folder), "--steps", "6")
    try:
        trainer.communicate(timeout=PATIENCE)
        assert trainer.returncode == 0
        spoken, _ = server.communicate(timeout=PATIENCE)
        assert server.returncode == 0
    finally:
        trainer.kill()
        server.kill()
    # A trainer that was killed between an update and its checkpoint takes this step again: at most one update more.
    steps = [int(line.split()[2]) for line in spoken.splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] in (6, 7)
    # The last published weights are those that the trainer saved.
    spec = importlib.util.spec_from_file_location("rl_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    live = module.Policy(torch.bfloat16)
    assert follow(live, folder).poll().lag == 0
    saved = torch.load(folder / "trainer.pt", weights_only=True)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, saved["policy"][name].bfloat16())


def test_a_trainer_publishes_through_its_callback(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from peraxis_format.torch.updates.callback import PublishUpdates

    model = nn.Linear(8, 8)
    callback = PublishUpdates(tmp_path, publish_every=2, anchor_every=2)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0)
    unused: Any = None
    callback.on_train_begin(unused, state, unused, model=model)
    for step in range(1, 6):
        state.global_step = step
        with torch.no_grad():
            model.weight.add_(0.01)
        callback.on_step_end(unused, state, unused)
    callback.on_train_end(unused, state, unused)
    callback.on_train_end(unused, state, unused)  # nothing changed, so nothing is published
    files, _ = list_updates(tmp_path)
    assert [(file.step, file.is_anchor) for file in files if not file.is_anchor] == [(1, False), (2, False), (3, False)]
    live = nn.Linear(8, 8, dtype=torch.bfloat16)
    assert follow(live, tmp_path).poll().step == 3
    assert torch.equal(live.weight, model.weight.bfloat16())


def test_only_process_zero_publishes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from peraxis_format.torch.updates.callback import PublishUpdates

    callback = PublishUpdates(tmp_path / "chain")
    state: Any = SimpleNamespace(is_world_process_zero=False, global_step=0)
    unused: Any = None
    callback.on_train_begin(unused, state, unused, model=nn.Linear(2, 2))
    callback.on_train_end(unused, state, unused)
    assert not (tmp_path / "chain").exists()
