"""Average two fine-tunes of one base without loading either of them.

    python examples/merge_two.py DELTA DELTA MERGED [BASE]

The sum keeps every mask, so it is exact except for one rounding of the scales to F16. BASE is needed if the two have
different exact tensors, such as norms.
"""

import sys

import peraxis


def main(first: str, second: str, merged: str, base: str | None = None) -> None:
    """Merge with equal weights, and print the distance of the result to the first one."""
    made = peraxis.merge([first, second], merged, weights=[0.5, 0.5], base=base, overwrite=True)
    print(f"{made.bytes:,} bytes, at most {made.masks_max} masks a module, {made.content_id}")
    found = peraxis.diff(first, merged, base=base)
    print(f"distance of the first one to the merge: {found.total.relative:.3f} of its delta")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
