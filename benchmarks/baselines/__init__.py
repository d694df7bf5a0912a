"""The baselines of the compressor, written only from the descriptions in the papers.

    bitdelta  BitDelta (arXiv 2402.10193): one scalar per module, then distillation of all scalars
    paper     Per-Axis Weight Deltas (arXiv 2512.19720), Algorithms 1 to 4: whole-model forward passes for each module

Both write `.pxd` files, so their bytes are counted by the same rule as ours.
"""
