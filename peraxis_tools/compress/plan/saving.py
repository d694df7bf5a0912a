"""Check that a delta saves enough: the whole file of the plan, and the written file.

A lossless delta (`exact`) is not checked: its size depends on the number of changes, which the plan does not know.
"""

from __future__ import annotations

from collections import defaultdict

from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.compress.plan.pairing import quantised_side
from peraxis_tools.compress.plan.plan import EXACT, WITHIN_BUDGET, Plan
from peraxis_tools.deltas.whole_tensors import SAVING_MIN
from peraxis_tools.display.notes import note
from peraxis_tools.errors import ToolError

__all__ = ["check_saving", "note_saving", "saves"]


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
