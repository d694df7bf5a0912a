"""Read a delta with numpy alone, and rebuild one tensor of the fine-tune bit for bit.

python examples/read_a_file.py DELTA BASE
"""

import sys

import numpy as np

import peraxis_format as pxd


def main(path: str, base: str) -> None:
    """Print every module; rebuild the first one that has signs."""
    with pxd.open(path) as delta, pxd.Safetensors.open(base) as checkpoint:
        print(delta)
        for name in delta:
            entry = delta.entry(name)
            axes = ", ".join(component.axis.value for component in entry.components)
            print(f"{name}: {entry.encoding.value} {axes} {list(entry.shape)} {entry.dtype.value}")
        name = next(name for name in delta if delta.entry(name).components)
        before = checkpoint.read(name)
        pxd.check_base_bytes(delta.entry(name), before)  # another base is an error, never a wrong weight
        after = pxd.reconstruct(delta.load(name), before)  # load checks the digest of the bytes that it returns
        print(f"{name}: {np.count_nonzero(before != after)} of {after.size} weights differ from the base")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
