"""What the compressor is measured against, written from the papers' descriptions alone.

    bitdelta  BitDelta (arXiv 2402.10193): one scalar a module, then distillation of all scalars
    paper     Per-Axis Weight Deltas (arXiv 2512.19720), Algorithms 1 to 4: whole-model forwards for each module

Both write `.pxd` files, so bytes are counted by the same rule as ours.
"""
