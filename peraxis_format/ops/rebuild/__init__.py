"""Base + components -> weights, bit for bit (SPEC 6): interface and backends.

    a = f32(base);  for each component in order: a = fl32(a + term);  W = round(a) to the module's dtype
    term = sign * (row_i * col_j)        exact in binary32, 2^e folded into row (SPEC 6.1); NaN is canonical (SPEC 6.2)

    reconstruct      a module of a file and its base tensor      numpy (the reference) | numba
    rebuild          matrices as storage arrays                  numpy | numba
    rebuild_tensor   a matrix as a torch tensor                  torch | numba
    (triton.py)      all modules of a transfer on a GPU          launched by torch/swap/engine.py

No backend reorders or fuses operations, so all give the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peraxis_format.delta import ComponentFactors, Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType, digest_of, from_float32, to_float32
from peraxis_format.errors import ShapeError, fail
from peraxis_format.ops.backend import choose
from peraxis_format.ops.exact import apply as apply_exact
from peraxis_format.ops.rebuild import numpy as reference

if TYPE_CHECKING:
    from torch import Tensor

    from peraxis_format.ops.rebuild.torch import ComponentTensors

__all__ = ["dense_delta", "rebuild", "rebuild_tensor", "reconstruct"]


def reconstruct(module: ModuleDelta, base: Array | None = None, *, backend: str | None = None) -> Array:
    """Rebuild the fine-tuned tensor, bit for bit (SPEC 6).

    base: storage array of the base tensor, in the dtype and shape of `module.base`; not read for `full`.
    backend: numpy or numba; None chooses by size. Returns a new storage array in the module's dtype and shape. Raises
    ShapeError if base does not match, BackendError, BindingError (E405) if an exact module does not give its result.
    """
    if module.encoding is Encoding.FULL:
        return np.array(module.full)  # SPEC 6.4
    ref = module.base
    if ref is None or base is None or base.shape != ref.dtype.storage_shape(ref.shape):
        raise ShapeError(f"{module.name}: needs its base tensor, {ref}")
    if base.dtype != ref.dtype.storage:
        raise ShapeError(f"{module.name}: needs its base tensor, {ref}")
    out: NDArray[Any] = np.empty(module.dtype.storage_shape(module.shape), module.dtype.storage)
    kept = ref.dtype.first_rows(base, ref.shape, module.kept)
    covered = module.dtype.first_rows(out, module.shape, module.kept)
    if module.encoding is Encoding.SAME:
        # SPEC 6.3
        covered[...] = kept if ref.dtype is module.dtype else from_float32(to_float32(kept, ref.dtype), module.dtype)
    elif module.index is not None and module.data is not None:
        covered[...] = kept
        apply_exact(covered, module.index, module.data, module.dtype, backend=backend, field=module.name)
    else:
        rebuild(module.factors(), kept, covered, base_dtype=ref.dtype, dtype=module.dtype, backend=backend)
    if module.tail is not None:
        module.dtype.rows_from(out, module.shape, module.kept)[...] = module.tail  # SPEC 6.4
    if module.result is not None and digest_of(out) != module.result:
        fail("E405", field=module.name)  # SPEC 7.4
    return out


def rebuild(
    matrices: Sequence[Sequence[ComponentFactors]],
    base: Array,
    out: Array,
    *,
    base_dtype: DType,
    dtype: DType,
    threads: int | None = None,
    backend: str | None = None,
) -> None:
    """out = base + components (SPEC 6.1, 6.2).

    matrices: the components of each matrix of the batch in order (ModuleDelta.factors). base, out: storage arrays
    [..., d_out, d_in] in base_dtype and dtype; they may be the same array, and otherwise must not overlap. threads: at
    most this many, for numba; None for one per processor. backend: numpy or numba. Raises BackendError.
    """
    chosen = choose("rebuild", base.size, backend=backend)
    if chosen == "numba" and out.flags.c_contiguous and base.size and all(matrices):
        from peraxis_format.ops.rebuild import numba as compiled

        compiled.rebuild(matrices, base, out, base_dtype=base_dtype, dtype=dtype, threads=threads)
    else:
        reference.rebuild(matrices, base, out, base_dtype=base_dtype, dtype=dtype)


def rebuild_tensor(
    weight: Tensor,
    components: Sequence[ComponentTensors],
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The merged weight [d_out, d_in] of a base weight on any device (SPEC 6.1, 6.2).

    out: the output, contiguous, in BF16, F16 or F32; None for a new tensor in the weight's dtype. backend: torch, or
    numba for tensors on the CPU. Raises BackendError.
    """
    from peraxis_format.ops.rebuild import torch as plain

    out = plain.output_like(weight) if out is None else out
    chosen = choose("rebuild_tensor", weight.numel(), weight.device.type, backend)
    if chosen == "numba" and weight.numel() and components:
        plain.rebuild_compiled(weight, components, out)
    else:
        plain.rebuild(weight, components, out)
    return out


def dense_delta(module: ModuleDelta) -> NDArray[np.float32]:
    """The sum of a `sign` module's components in order, in binary32: [..., d_out, d_in] over the covered rows."""
    total = np.zeros(module.covered, np.float32)
    reference.add_components(module.factors(), total)
    return total
