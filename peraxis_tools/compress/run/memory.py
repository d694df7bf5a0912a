"""Compare the memory of a fit on text with the machine's, before the work: a process that is killed prints no message.

A fit on another device than a CPU is not checked.

The estimate (plan/estimate.py) is within 20% of what runs take. So a run is refused only if its estimate is more than
20% above all memory of the machine, swap included: it cannot fit. If it is above what is free now, a note says so and
the run begins, because memory may become free, and swap may serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import size
from peraxis_tools.errors import ToolError

if TYPE_CHECKING:
    from peraxis_tools.compress.options import CompressOptions
    from peraxis_tools.compress.plan.stage_work import StageWork

__all__ = ["MachineMemory", "check_memory", "held_bytes", "machine_memory"]

_WITHIN: Final = 1.2  # of the estimate
_PROC: Final = Path("/proc")
_GROUPS: Final = Path("/sys/fs/cgroup")
_UNLIMITED: Final = 1 << 60  # a group without a limit says a number near 2^63


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A version of control groups: the files of a group. with_memory: the limit of swap is that of both together."""

    controller: str
    limit: str
    used: str
    swap: str
    with_memory: bool


_KINDS: Final = (
    _Kind(controller="", limit="memory.max", used="memory.current", swap="memory.swap.max", with_memory=False),
    _Kind(
        controller="memory",
        limit="memory.limit_in_bytes",
        used="memory.usage_in_bytes",
        swap="memory.memsw.limit_in_bytes",
        with_memory=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """Bytes. available: those a process can take now without swap; total: all, with swap."""

    available: int
    total: int


def held_bytes(*, proc: Path = _PROC) -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _values(proc / "self" / "status").get("VmRSS", 0)


def machine_memory(*, proc: Path = _PROC, groups: Path = _GROUPS) -> MachineMemory | None:
    """The memory of this machine, or of the control group whose limit is lower; None where the system does not say."""
    found = _values(proc / "meminfo")
    if "MemAvailable" not in found or "MemTotal" not in found:
        return None
    available, swap = found["MemAvailable"], found.get("SwapTotal", 0)
    total = found["MemTotal"] + swap
    for kind, folder in _own_groups(proc, groups):
        most = _number(folder / kind.limit)
        if most is None or most >= _UNLIMITED:
            continue
        swapped = _number(folder / kind.swap)  # None: no limit of its own
        if swapped is None:
            swapped = swap
        elif kind.with_memory:
            swapped = max(0, swapped - most)
        stat = _values(folder / "memory.stat")
        cached = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        available = min(available, max(0, most - (_number(folder / kind.used) or 0) + cached))
        total = min(total, most + min(swap, swapped))
    return MachineMemory(available=available, total=total)


def _own_groups(proc: Path, groups: Path) -> Iterator[tuple[_Kind, Path]]:
    """The folders of the groups of this process: in a container the top one, else also those on the way to its own."""
    paths = {"": "", "memory": ""}
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths.update(dict.fromkeys({*controllers.split(",")} & set(paths), path))
    for kind in _KINDS:
        folder = groups / kind.controller
        yield kind, folder
        for name in paths[kind.controller].split("/"):
            if name not in ("", ".", ".."):
                folder /= name
                yield kind, folder


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
    if most.memory <= machine.available:
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
        name, number, *unit = [*line.replace(":", " ", 1).split(), "", ""][:3]
        if (value := _natural(number)) is not None:
            found[name] = value * (1024 if unit == ["kB"] else 1)
    return found


def _number(path: Path) -> int | None:
    """The number of a file; None without one, as for `max`."""
    return _natural(_text(path).strip())


def _natural(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
