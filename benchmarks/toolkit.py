"""Time `verify` and `diff` on 1 GB artifacts with 8B shapes beside reading and hashing the same bytes on all cores.

    python benchmarks/toolkit.py
    python benchmarks/toolkit.py --folder /tmp/artifacts    # writes 3 GB there once and keeps them

The targets: `verify`, including the opening of the file, reaches 85% of the rate of hashing. `diff` takes at most twice
as long as reading and hashing both files, and stays below 300 MB of memory, which is measured in its own process. Each
verb alternates with the hashing that it is compared with.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Benchmark, arguments, timed_together
from make_artifact import write_artifact, write_variation

import peraxis_format as pxd
from peraxis_tools.diff import diff

_PIECE = 16 << 20
_CHUNK = 1 << 20


def hash_all(*paths: Path) -> None:
    """Read and hash files in pieces on all cores, the minimum work of a digest check."""

    def work(piece: tuple[int, int, int]) -> None:
        descriptor, begin, end = piece
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK))
        for offset in range(begin, end, _CHUNK):
            count = os.preadv(descriptor, [buffer[: end - offset]], offset)
            digest.update(buffer[:count])

    files = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        sizes = [os.fstat(file).st_size for file in files]
        pieces = [
            (file, begin, min(begin + _PIECE, size))
            for file, size in zip(files, sizes, strict=True)
            for begin in range(0, size, _PIECE)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, pieces))
    finally:
        for file in files:
            os.close(file)


def verify(path: Path) -> None:
    """Open a file and check its digests."""
    with pxd.open(path) as delta:
        delta.verify()


def peak_megabytes(a: Path, b: Path) -> float:
    """Return the peak resident memory in MB of a process that runs `diff`, including interpreter and libraries."""
    # ru_maxrss would include the parent's memory, which the child has between fork and exec. VmHWM does not.
    code = (
        "import sys; from peraxis_tools.diff import diff; diff(*sys.argv[1:]);"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(a), str(b)], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e6


def main() -> None:
    """Measure and write the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="folder of the artifacts; missing ones are written")
    options = parser.parse_args()
    bench = Benchmark("toolkit", parameters={"threads": os.cpu_count()})
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measure(bench, folder, options.repeat)
    bench.finish(options.json, options.plot)


def measure(bench: Benchmark, folder: Path, repeat: int) -> None:
    """Time both verbs on the files in this folder. Missing files are written first."""
    a, near, far = (folder / f"{name}.pxd" for name in ("a", "near", "far"))
    folder.mkdir(parents=True, exist_ok=True)
    if not a.exists():
        write_artifact(a, seed=0)
    if not near.exists():
        write_variation(near, a, flip=0.02)
    if not far.exists():
        write_artifact(far, seed=1)
    size = a.stat().st_size
    one, checked = timed_together([lambda: hash_all(a), lambda: verify(a)], repeat=repeat)
    hashing = bench.add("hash one", one, moved=size)
    bench.add("verify", checked, moved=size, against=hashing)
    both, close, apart = timed_together(
        [lambda: hash_all(a, near), lambda: diff(a, near), lambda: diff(a, far)], repeat=repeat
    )
    hashing = bench.add("hash both", both, moved=2 * size)
    peak = peak_megabytes(a, far)
    bench.add("diff, 2% of bytes replaced", close, moved=2 * size, against=hashing)
    bench.add(
        "diff, independent signs", apart, moved=2 * size, against=hashing, note=f"peak {peak:.0f} MB", peak_mb=peak
    )


if __name__ == "__main__":
    main()
