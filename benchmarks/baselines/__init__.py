"""The baselines of the compressor, written only from the descriptions in the papers.

    bitdelta    BitDelta (arXiv 2402.10193): one scalar per module, then distillation of all scalars
    paper       Per-Axis Weight Deltas (arXiv 2512.19720), Algorithms 1 to 4: whole-model forward passes for each module
    lora        a full fine-tune as a LoRA of a number of bytes: singular vectors in F16, then distillation of both
    delta_come  Delta-CoMe (arXiv 2406.08903): singular vectors at 8, 3 and 2 bits, rounded with GPTQ; no training

All write `.pxd` files. The bytes of the first two are those of their files, as for ours; of the others, those that
their factors would take.
"""
