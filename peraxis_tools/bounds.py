"""The bounds of `verify`, measured by `diff` and `evaluate`. This module runs verbs but is not a verb."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peraxis_tools.diff import diff_checkpoint
from peraxis_tools.display.progress import ProgressOf, StageOpener
from peraxis_tools.errors import CheckFailedError

__all__ = ["error_within", "kl_within"]


def error_within(
    bound: float,
    delta: Path,
    fine_tuned: str | Path,
    *,
    base: str | Path,
    progress: ProgressOf,
    workers: int | None = None,
) -> str:
    """Check that ||delta - (fine_tuned - base)|| / ||fine_tuned - base|| <= bound. Returns a text with the error.

    What has no such difference must be equal bit by bit: new rows, integers, tensors that the base lacks. Raises
    CheckFailedError if the error is larger, or if tensors differ in name, dtype, shape or these bits; PxdError,
    CheckpointError.
    """
    found = diff_checkpoint(
        delta, fine_tuned, base=base, workers=workers, progress=StageOpener(lambda _, total: progress("error", total))
    )
    if found.only_in_a or found.only_in_b:
        odd = (*found.only_in_a, *found.only_in_b)[0]
        raise CheckFailedError(f"does not have the same tensors as {fine_tuned}, for example {odd}")
    for module in found.modules:
        if module.changes:
            raise CheckFailedError(f"{module.name}: differs from that of {fine_tuned}: {module.changes[0]}")
        if module.distance is None and not module.identical:
            raise CheckFailedError(f"{module.name}: differs from that of {fine_tuned}: {module.note or 'in its bits'}")
        if bound == 0.0 and module.distance == 0.0 and not module.identical:
            raise CheckFailedError(f"{module.name}: differs from that of {fine_tuned} in bits that no distance shows")
    error = found.total.relative if found.total.measured else 0.0
    if error is None:
        raise CheckFailedError(f"changes weights that are the base's in {fine_tuned}")
    if not error <= bound:
        raise CheckFailedError(f"relative error {error:.4g} is above {bound:g}")
    return f"relative error {error:.4g}, at most {bound:g}"


def kl_within(
    bound: float,
    delta: Path,
    fine_tuned: str | Path,
    *,
    base: str | Path,
    texts: Mapping[str, str | Path],
    progress: ProgressOf,
) -> str:
    """Check that KL(fine-tuned || merged) is at most `bound` nats per token on every text. Returns the largest as text.

    Raises CheckFailedError with the domain of the largest if it is larger, ToolError, PxdError, CheckpointError.
    """
    from peraxis_tools.evaluate import worst_kl

    with progress("kl", None):
        domain, kl = worst_kl(base, fine_tuned, delta, texts)
    found = f"KL {kl:.4g} nats per token on {domain}"
    if not kl <= bound:
        raise CheckFailedError(f"{found} is above {bound:g}")
    return f"{found}, at most {bound:g}"
