"""Step 12 of SPEC 8: the base is the one that the delta was made for (SPEC 7)."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from peraxis_format.arguments import check_least
from peraxis_format.checkpoint import Safetensors, TensorInfo
from peraxis_format.dtypes import Array, digest_of
from peraxis_format.errors import BindingError, base_advice, fail, previous_advice
from peraxis_format.manifest import Manifest, ModuleEntry

__all__ = [
    "check_base",
    "check_base_bytes",
    "check_base_digest",
    "check_base_names",
    "check_base_tensor",
    "name_base",
]


def check_base_names(manifest: Manifest, base: Safetensors) -> None:
    """Check that the base has every tensor, by name, dtype and shape. Reads headers only.

    Raises BindingError: E401, E402 (SPEC 7.1), E403 (SPEC 7.2).
    """
    bound = [module for module in manifest.modules if module.base is not None]
    foreign = base.foreign
    missing = [module.name for module in bound if module.name not in base and module.name not in foreign]
    if bound and len(missing) == len(bound):
        fail("E401", f"{base.label} has none of {len(missing)} base tensors, for example {missing[0]!r}")
    if missing:
        fail("E402", f"{base.label} has no {missing[0]!r} ({len(missing)} of {len(bound)} missing)")
    for module in bound:
        if module.name in foreign:
            fail("E403", f"dtype {foreign[module.name][:32]!r}, which is unknown", field=module.name)
        check_base_tensor(module, base[module.name])


def check_base_tensor(module: ModuleEntry, found: TensorInfo) -> None:
    """Check the dtype and shape of one base tensor (SPEC 7.2). Raises BindingError (E403)."""
    wanted = module.base
    if wanted is not None and (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        fail(
            "E403",
            f"{found.dtype.value} {list(found.shape)}, not {wanted.dtype.value} {list(wanted.shape)}",
            field=module.name,
        )


def check_base_digest(module: ModuleEntry, sha256: str) -> None:
    """Check the bytes of one base tensor (SPEC 7.3). sha256: their hex digest. Raises BindingError (E404)."""
    if module.base is not None and sha256 != module.base.sha256:
        fail("E404", field=module.name)


def check_base_bytes(module: ModuleEntry, tensor: Array) -> None:
    """`check_base_digest` on a storage array, so that the checked bytes are those that are used."""
    check_base_digest(module, digest_of(tensor))


def check_base(
    manifest: Manifest,
    base: Safetensors,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Step 12 for the whole file: names, dtypes, shapes, then digests on several threads.

    Raises the BindingError of the first failing module in file order.
    """
    check_least("workers", workers, 1)
    check_base_names(manifest, base)
    bound = [module for module in manifest.modules if module.base is not None]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        digests = pool.map(lambda module: base.sha256(module.name, progress=progress), bound)
        for module, digest in zip(bound, digests, strict=True):
            check_base_digest(module, digest)


def name_base(error: BaseException | None, manifest: Manifest, file: str | os.PathLike[str]) -> None:
    """Make the remedy of a BindingError of this file name the base, or the update that the file follows."""
    if not isinstance(error, BindingError) or error.advice is not None or error.file not in (None, os.fspath(file)):
        return
    if manifest.previous is not None:
        error.advice = previous_advice(manifest.previous)
    else:
        error.advice = base_advice(manifest.base.id, manifest.base.revision)
