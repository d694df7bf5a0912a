"""The memory of a run beside that of the machine: one line before the work, because a run that is killed says nothing.

The estimate (plan/estimate.py) is within 20% of what runs take. So a run is refused only if its estimate is more than
20% above all memory of the machine, swap included: it cannot fit. If it is above what is free now, a note says so and
the run begins, because memory may become free, and swap may serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peraxis_tools.errors import ToolError
from peraxis_tools.notes import note
from peraxis_tools.shown import size

if TYPE_CHECKING:
    from peraxis_tools.compress.options import CompressOptions
    from peraxis_tools.compress.plan.estimate import StageWork

__all__ = ["MachineMemory", "check_memory", "held_bytes", "machine_memory"]

_WITHIN: Final = 1.2  # of the estimate
_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")
_UNLIMITED: Final = 1 << 60  # a group without a limit says a number near 2^63


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """Bytes. available: those a process can take now without swap; total: all, with swap."""

    available: int
    total: int


def held_bytes(*, proc: Path = _PROC) -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _values(proc / "self" / "status").get("VmRSS", 0)


def machine_memory(*, proc: Path = _PROC, groups: Path = _GROUPS) -> MachineMemory | None:
    """The memory of this machine, or of the container whose limit is lower; None where the system does not say."""
    found = _values(proc / "meminfo")
    if "MemAvailable" not in found or "MemTotal" not in found:
        return None
    available, total = found["MemAvailable"], found["MemTotal"] + found.get("SwapTotal", 0)
    for group, limit, used in (
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most = _number(group / limit)
        if most is not None and most < _UNLIMITED:
            cached = _values(group / "memory.stat").get("inactive_file", 0)
            available = min(available, max(0, most - (_number(group / used) or 0) + cached))
            total = min(total, most)
    return MachineMemory(available=available, total=total)


def check_memory(
    works: Sequence[StageWork], options: CompressOptions, *, held: int, machine: MachineMemory | None
) -> None:
    """Note that a run needs more memory than is free. Raises ToolError if it needs more than the machine has.

    works: the stages of the run. held: bytes that this process holds already.
    """
    if machine is None:
        return
    most = max(works, key=lambda work: work.memory)
    needed = held + most.memory
    if most.memory <= machine.available and needed <= machine.total:
        return
    says = f"memory: the stage {most.name} needs about {size(needed)}"
    if needed > _WITHIN * machine.total:
        raise ToolError(f"{says}, and this machine has {size(machine.total)}; {_remedy(most.name, options)}")
    note(f"{says}, and {size(held + machine.available)} are free, so it may be killed; {_remedy(most.name, options)}")


def _remedy(stage: str, options: CompressOptions) -> str:
    """What lowers the memory of a stage."""
    if stage == "distill" and options.distill_sign_lr > 0:
        return "--distill-sign-lr 0 keeps the signs, --distill-samples 0 leaves the stage out"
    if stage == "distill":
        return "--distill-samples 0 leaves the stage out, a shorter --sequence-length lowers it"
    if stage == "generate":
        return "--generated-samples 0 leaves the stage out, a smaller --batch-size lowers it"
    if stage == "sensitivity":
        return "--masks 1 in place of a target leaves the stage out"
    if stage == "blocks":
        return "fewer --calibration-samples, or a shorter --sequence-length, lower it"
    if stage == "table":
        return "--embeddings full leaves the stage out"
    return "--fit none takes the least"


def _values(path: Path) -> dict[str, int]:
    """The numbers of a file with one name and one number a line; bytes where the unit is kB. Empty without the file."""
    found: dict[str, int] = {}
    for line in _text(path).splitlines():
        name, *rest = line.replace(":", " ", 1).split()
        if rest and rest[0].isdigit():
            found[name] = int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1)
    return found


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
