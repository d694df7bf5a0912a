"""Check that a delta saves enough, and note where it saves too much: the whole file of the plan, and the written file.

A lossless delta (`exact`) is not checked: its size depends on the number of changes, which the plan does not know.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Final

from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.compress.plan.pairing import quantised_side
from peraxis_tools.compress.plan.plan import EXACT, LEFT_AT_BASE, WITHIN_BUDGET, Plan
from peraxis_tools.deltas.whole_tensors import SAVING_MIN
from peraxis_tools.display.notes import note
from peraxis_tools.errors import ToolError

__all__ = ["check_saving", "note_left_at_base", "note_saving", "saves"]

# With a text a twelfth of a checkpoint leaves none, and a sixteenth a quarter, at several times the KL (figures.md).
_SHARE_LEFT: Final = 0.1


def saves(plan: Plan, size: int) -> bool:
    """Whether a file of `size` bytes saves enough of the plan's checkpoint, or is exempt from the check."""
    return plan.full_bytes >= SAVING_MIN * size or _largest_loss(plan)[0] == EXACT


def check_saving(plan: Plan, base: Checkpoint, fine_tuned: Checkpoint, *, size: int, force: bool) -> None:
    """Raise ToolError if a file of `size` bytes saves little, with the reason; with force this is only a note."""
    if saves(plan, size):
        return
    message = _little_saved(plan, base, fine_tuned, size)
    if not force:
        raise ToolError(f"{message}, or pass force (--force)")
    note(message)


def note_saving(plan: Plan, base: Checkpoint, fine_tuned: Checkpoint, *, size: int) -> None:
    """Note that a run would refuse to write a file of `size` bytes, if it would."""
    if not saves(plan, size):
        saved = _little_saved(plan, base, fine_tuned, size)
        note(f"{saved}; if every tensor changed, the run will be refused without force (--force)")


def note_left_at_base(plan: Plan, *, calibrated: bool) -> None:
    """Note which share of the matrices' weights stays as in the base, if the target leaves too few bytes for them."""
    open_to_signs = [module for module in plan.modules if module.components or module.reason == LEFT_AT_BASE]
    left = sum(math.prod(module.shape) for module in open_to_signs if not module.components)
    share = left / max(1, sum(math.prod(module.shape) for module in open_to_signs))
    if share < _SHARE_LEFT:
        return
    remedy = "allow more bytes"
    if not calibrated:
        remedy = "pass calibration (--calibration), because a text shows better uses of the bytes, or allow more"
    note(f"{100 * share:.0f}% of the weights in matrices stay as in the base, because the target is small; {remedy}")


def _little_saved(plan: Plan, base: Checkpoint, fine_tuned: Checkpoint, size: int) -> str:
    reason, count = _largest_loss(plan)
    why = quantised_side(base, fine_tuned)
    if why is None and plan.full_bytes >= SAVING_MIN * plan.payload_bytes:
        why = f"{size - plan.payload_bytes} of them are header and files such as the tokenizer's; so small a checkpoint"
        why += " is best shipped whole"
    if why is None and reason == WITHIN_BUDGET:
        why = "the target allows that many; ask for fewer"
    why = why or f"{count} tensors are stored whole ({reason}); check that this is the base"
    return f"{fine_tuned.tensors.label}: a delta would take {size} of {plan.full_bytes} bytes: {why}"


def _largest_loss(plan: Plan) -> tuple[str, int]:
    """The reason for which most bytes are exact, and the number of tensors with it."""
    lost: dict[str, int] = defaultdict(int)
    for module in plan.modules:
        if not module.components:
            lost[module.reason] += module.payload_bytes
    reason = max(lost, key=lambda key: lost[key], default="")
    return reason, sum(module.reason == reason for module in plan.modules)
