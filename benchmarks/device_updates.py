"""Measure the decoding of exact updates on a device beside a copy of the weights and beside decoding on the CPU.

    python benchmarks/device_updates.py --json device_updates.json

Updates are drawn as in updates.py. `device` uploads the data and decodes it on the device; the upload is part of the
time. `processor and link` decodes on the threads of the CPU and uploads the weights. moved: bytes of the weights, read
once and written once.
"""

from __future__ import annotations

import numpy as np
import torch
from harness import Benchmark, arguments, timed_together

from peraxis_format.dtypes import DType, from_float32
from peraxis_format.ops.exact import apply, encode
from peraxis_format.ops.exact.torch import moved
from peraxis_format.ops.tensors import storage_array

STEPS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


def drawn(weights: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return BF16 weights before and after a Gaussian step of their F32 master weights. step: standard deviation."""
    random = np.random.default_rng(0)
    master = random.standard_normal(weights, np.float32) * np.float32(0.02)
    after = master + random.standard_normal(weights, np.float32) * np.float32(step)
    return from_float32(master, DType.BF16), from_float32(after, DType.BF16)


def main() -> int:
    """Measure and write the figures. Raises RuntimeError if the device decodes other weights."""
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=int, default=1 << 26, help="elements of the tensor")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    bench = Benchmark("device_updates", parameters={"weights": options.weights, "device": options.device})
    size = 2 * options.weights
    for step in STEPS:
        old, new = drawn(options.weights, step)
        index, data = encode(old, new, DType.BF16)
        share = float(np.mean(old != new))
        host = torch.from_numpy(old.view(np.int16)).view(torch.bfloat16)
        live = host.to(device)
        found = moved(live, index, data, DType.BF16, backend="triton")
        if storage_array(found.cpu()).tobytes() != new.tobytes():
            raise RuntimeError(f"step {step:g}: the device gave other weights")

        def processor(index=index, data=data, host=host, device=device) -> object:  # type: ignore[no-untyped-def]
            out = host.clone()
            apply(storage_array(out), index, data, DType.BF16)
            return out.to(device)

        copy, ours, theirs = timed_together(
            [
                live.clone,
                lambda live=live, index=index, data=data: moved(live, index, data, DType.BF16, backend="triton"),
                processor,
            ],
            repeat=options.repeat,
            sync=torch.cuda.synchronize if cuda else None,
        )  # fmt: skip
        changed = {"changed": share, "bytes": int(data.nbytes + index.nbytes)}
        first = bench.add(f"{share:.2%} changed: copy", copy, moved=2 * size)
        bench.add(f"{share:.2%} changed: device", ours, moved=2 * size, against=first, **changed)
        bench.add(f"{share:.2%} changed: processor and link", theirs, moved=2 * size, against=first, **changed)
    bench.finish(options.json, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
