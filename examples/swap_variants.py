"""One model in memory, several fine-tunes, one at a time.

python examples/swap_variants.py BASE DELTA DELTA
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import peraxis


def main(base: str, first: str, second: str) -> None:
    """Use each variant once, then the base again."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    with peraxis.VariantSwitch(model) as switch, torch.no_grad():
        for delta in (first, second):
            switch.add(Path(delta).stem, delta)
        for variant in switch.variants():
            swap = switch.use(variant.name)
            token = int(model(prompt).logits[0, -1].argmax())
            print(f"{variant.name}: next token {token}, swapped in {1000 * swap.seconds:.1f} ms")
        switch.use(None)  # close leaves the weights as they are: go back to the base while its copy is there
        print(f"base: next token {int(model(prompt).logits[0, -1].argmax())}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
