"""Several fine-tunes in one batch: each sequence gets its own, over one copy of the base.

python examples/serve_a_batch.py BASE DELTA DELTA
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import peraxis


def main(base: str, first: str, second: str) -> None:
    """Generate with the first variant, the base and the second variant at once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    prompts = torch.tensor([[5, 6, 7, 8]] * 3)
    variants = {"first": first, "second": second}
    with peraxis.serve(model, variants) as served, served.using(["first", None, "second"]):
        tokens = model.generate(input_ids=prompts, max_new_tokens=4, do_sample=False)
    for name, row in zip(["first", "base", "second"], tokens.tolist(), strict=True):
        print(f"{name}: {row}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
