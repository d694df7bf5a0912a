"""GRPO with TRL: the trainer publishes its weights every few steps, and a server follows them in another process.

python examples/trl_publish.py train BASE CHAIN [STEPS]
python examples/trl_publish.py serve BASE CHAIN [STEPS]
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM

import peraxis

EVERY = 2  # optimizer steps for each published one


def train(base: str, chain: str, steps: int) -> None:
    """Reward completions with many different words. CHAIN is a folder or a URL."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    options = GRPOConfig(
        output_dir=f"{chain}-run", max_steps=steps, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=16, learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False,
    )  # fmt: skip
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=None,
        args=options,
        train_dataset=Dataset.from_list([{"prompt": "The answer"}] * 64),
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        callbacks=[peraxis.PublishUpdates(chain, publish_every=EVERY)],
    ).train()


def serve(base: str, chain: str, steps: int) -> torch.nn.Module:
    """Follow until the last step is published, between batches of your own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with peraxis.follow(model, chain) as follower:
        while follower.step != -(-steps // EVERY):
            found = follower.poll()
            if found.applied:
                print(f"serving step {found.step}, {len(found.applied)} files applied", flush=True)
            time.sleep(0.1)
    return model


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in ("train", "serve"):
        sys.exit(__doc__)
    {"train": train, "serve": serve}[sys.argv[1]](sys.argv[2], sys.argv[3], int((*sys.argv, "4")[4]))
