"""Float32 matrix products through oneDNN where they keep float32's precision.

torch multiplies float32 matrices with MKL, whose kernels leave half of an AMD processor's vector width unused. oneDNN
uses all of it: twice as fast on a Zen 5. torch selects oneDNN for float32 only where a lower precision is permitted as
well. Processors with matrix units (AMX) would make use of that permission, others compute in float32 in any case. So a
product whose exact result needs float32 is computed first, and the permission is withdrawn if that result is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from peraxis_tools.process.process_context import ProcessContext

__all__ = ["fast_products"]

_SIDE = 256  # of the products that test the precision; torch computes small ones without oneDNN
_PERMISSION = "bf16"


@contextmanager
def _fast_products() -> Iterator[None]:
    setting = _setting()
    if setting is None or not _is_amd():
        yield
        return
    before = setting.fp32_precision
    try:
        setting.fp32_precision = _PERMISSION
        if not _keeps_float32():
            setting.fp32_precision = before
        yield
    finally:
        setting.fp32_precision = before


def _setting() -> Any:
    """torch's setting for float32 products of oneDNN; None for a torch before 2.9 or without oneDNN."""
    matmul = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return matmul if wide and hasattr(matmul, "fp32_precision") else None


def _is_amd() -> bool:
    """Whether this is a processor of AMD; on others MKL uses the whole vector width itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return any("AuthenticAMD" in line for _, line in zip(range(16), file, strict=False))
    except OSError:
        return False


def _keeps_float32() -> bool:
    """Whether products keep the last of float32's 24 bits."""
    fine = torch.full((_SIDE, _SIDE), 1.0 + 2.0**-23)
    return all(torch.equal(product, fine) for product in (fine @ torch.eye(_SIDE), torch.eye(_SIDE) @ fine))


# Inside this context float32 products on the CPU are those of oneDNN, if it is the faster library and exact.
fast_products: Final = ProcessContext(_fast_products)
