"""A trainer that learns by REINFORCE, and a server that follows its weights through a folder, in two processes.

    python examples/rl_loop.py trainer chain --steps 200      # in one terminal
    python examples/rl_loop.py server chain --until 200       # in another
    python examples/rl_loop.py both chain --steps 60          # or both at once

The policy is a small recurrent network in binary32; the server runs it in BF16. It samples numbers, and the reward
counts those that are one more than the number before. The trainer publishes an exact update after every step; the
server checks and applies each, and prints the reward of its own samples. If either is killed and started again, the
trainer continues from its last checkpoint, the chain from its last update, and the server catches up.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peraxis import UpdateWriter, follow

VOCABULARY, LENGTH, BATCH = 16, 24, 128


class Policy(nn.Module):
    """Logits of the next number."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64, dtype=dtype)
        self.core = nn.GRUCell(64, 128, dtype=dtype)
        self.head = nn.Linear(128, VOCABULARY, dtype=dtype)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences [count, LENGTH] and the log-probabilities of their numbers except the first."""
        number = torch.randint(VOCABULARY, (count,), generator=generator)
        hidden = self.head.weight.new_zeros(count, 128)
        numbers, logs = [number], []
        for _ in range(LENGTH - 1):
            hidden = self.core(self.embed(number), hidden)
            log = self.head(hidden).float().log_softmax(-1)
            number = torch.multinomial(log.detach().exp(), 1, generator=generator).squeeze(-1)
            numbers.append(number)
            logs.append(log.gather(-1, number[:, None]).squeeze(-1))
        return torch.stack(numbers, 1), torch.stack(logs, 1)


def reward(numbers: Tensor) -> Tensor:
    """1 for each number that is one more than the number before: [count, LENGTH - 1]."""
    return (numbers[:, 1:] == (numbers[:, :-1] + 1) % VOCABULARY).float()


def train(folder: Path, steps: int, rate: float) -> None:
    """Learn, publish, save; a killed trainer continues from its last checkpoint."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    saved, begun = folder / "trainer.pt", 0
    folder.mkdir(parents=True, exist_ok=True)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["step"]
    writer = UpdateWriter(policy, folder, name="policy", anchor_every=50)
    if writer.result is None:
        writer.step()
    for step in range(begun + 1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        numbers, logs = policy.sample(BATCH, generator)
        earned = reward(numbers)
        loss: Any = -((earned - earned.mean(0)) * logs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = writer.step()
        partial = saved.with_suffix(".new")
        torch.save({"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
        partial.replace(saved)
        share = done.changed / done.weights
        print(f"trainer  step {step}  reward {earned.mean():.3f}  changed {share:.2%}  {done.bytes} bytes", flush=True)
    writer.prune(anchors=2)


def serve(folder: Path, until: int) -> None:
    """Follow the chain and sample until a step is reached."""
    torch.set_num_threads(1)
    policy = Policy(torch.bfloat16)
    follower = follow(policy, folder)
    generator = torch.Generator().manual_seed(1)
    while follower.step is None or follower.step < until:
        found = follower.poll() if folder.is_dir() else None
        if found is not None and found.applied:
            with torch.no_grad():
                earned = reward(policy.sample(256, generator)[0]).mean()
            print(f"server   step {found.step}  reward {earned:.3f}  applied {len(found.applied)}", flush=True)
        else:
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="A trainer and a server, joined by a folder of exact updates.")
    parser.add_argument("role", choices=("trainer", "server", "both"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="The number of training steps.")
    parser.add_argument("--until", type=int, help="The published step that ends the server.")
    parser.add_argument("--rate", type=float, default=3e-3)
    given = parser.parse_args()
    until = given.until if given.until is not None else given.steps
    if given.role == "trainer":
        train(given.folder, given.steps, given.rate)
    elif given.role == "server":
        serve(given.folder, until)
    else:
        server = subprocess.Popen([sys.executable, __file__, "server", str(given.folder), "--until", str(until)])
        train(given.folder, given.steps, given.rate)
        sys.exit(server.wait())


if __name__ == "__main__":
    main()
