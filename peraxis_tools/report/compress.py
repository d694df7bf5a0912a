"""The text report of `compress`: the plan before, the result after."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from rich.console import Console

from peraxis_format import Encoding
from peraxis_tools.compress.plan.plan import EXACT
from peraxis_tools.deltas.blocks import blocks_text
from peraxis_tools.display.shown import counted, listed, times_smaller
from peraxis_tools.report.console import print_note, size, text

if TYPE_CHECKING:
    from peraxis_tools.compress import CompressResult, Plan
    from peraxis_tools.compress.run.dry_run import RunEstimate

__all__ = ["plan_lines", "render_compress", "render_dry_run"]

_NOTES_SHOWN = 8
_SHOWN: Final = (Encoding.SIGN, Encoding.SAME, Encoding.FULL, Encoding.EXACT)


def plan_lines(plan: Plan, *, compared: bool = False) -> None:
    """Print the plan on standard error: masks of modules, exact modules, and the predicted size.

    compared: whether the pair's weights were compared for the plan, so that modules with masks are known to differ.
    """
    masks = Counter(module.components for module in plan.modules if module.components)
    exact = Counter(module.reason for module in plan.modules if module.encoding is Encoding.FULL)
    new = {module.reason for module in plan.modules if module.base_shape is None}
    kept = Counter(module.reason for module in plan.modules if module.encoding is Encoding.SAME)
    open_ = "" if compared else " if changed"
    parts = [f"{counted(count, 'module')} with {counted(k, 'mask')}{open_}" for k, count in sorted(masks.items())]
    parts += [f"{count} as in the base ({reason})" for reason, count in sorted(kept.items())]
    parts += [
        f"{count} exact{'' if reason in new else ' if changed'} ({'asked for' if reason == EXACT else reason})"
        for reason, count in sorted(exact.items())
    ]
    whole = plan.payload_bytes if plan.file_bytes is None else plan.file_bytes
    print_note(f"plan: {', '.join(parts)}")
    if exact[EXACT]:  # their bytes follow from the number of changes
        print_note(f"plan: at most {size(whole)} of {size(plan.full_bytes)}")
    else:
        print_note(f"plan: {size(whole)} of {size(plan.full_bytes)}, {times_smaller(plan.full_bytes, whole)}")


def render_dry_run(result: RunEstimate, console: Console) -> None:
    """Print the bytes, memory and time of a run, in total and by stage.

    A dry run reads no weights, so it counts tensors that did not change as changed.
    """
    smaller = times_smaller(result.full_bytes, result.bytes)
    bound, ratio = ("at most ", "") if result.upper_bound else ("", f", {smaller}, if every tensor changed")
    console.print(
        f"would be  {bound}{size(result.bytes)} of {size(result.full_bytes)}{ratio}: "
        f"{result.encodings.get('sign', 0)} of {result.module_count} modules with signs"
    )
    seconds = "" if result.seconds is None else f", {result.seconds:.0f} processor seconds"
    free = "" if result.memory_available is None else f" ({size(result.memory_available)} are free)"
    console.print(f"takes     {size(result.memory)} of memory{free}{seconds}; fit {result.fit}")
    width = max((len(stage.name) for stage in result.stages), default=0)
    for stage in result.stages:
        seconds = "" if stage.seconds is None else f", {stage.seconds:.0f} s"
        console.print(f"  {text(stage.name.ljust(width))}  {size(stage.memory)} beyond the imports{seconds}")


def _fit_text(result: CompressResult) -> str:
    """How signs and scales were found, and on how much text."""
    if not result.encodings.get(Encoding.SIGN.value, 0):
        return "none: no module has signs"
    if not result.calibration_samples:
        return result.fit
    text_read = f"{counted(result.calibration_samples, 'sample')}, {counted(result.calibration_tokens, 'token')}"
    return f"{result.fit}, then distilled; {text_read}" if result.distillation else f"{result.fit}, on {text_read}"


def render_compress(result: CompressResult, console: Console, *, quiet: bool = False) -> None:
    """Print the file, its sizes, the fit, and the modules that differ from the plan.

    quiet: leave out the notes on modules.
    """
    console.print(
        f"[bold green]compressed[/]  {text(result.path)}  {size(result.bytes)} of {size(result.full_bytes)}, "
        f"{times_smaller(result.full_bytes, result.bytes)}"
    )
    console.print(f"content  {text(result.content_id)}")
    axes = ", ".join(f"{axis} {count}" for axis, count in result.axis_counts.items()) or "none"
    signed, same, full, updates = (result.encodings.get(encoding.value, 0) for encoding in _SHOWN)
    as_updates = f", {updates} of them as updates" if updates else ""
    console.print(
        f"modules  {signed} with signs, {same} as in the base, {full + updates} exact{as_updates}; masks: {axes}"
    )
    if result.blocks:
        console.print(f"blocks   {blocks_text(result.blocks, result.prefer)}")
    console.print(f"fit      {_fit_text(result)}")
    if result.distillation:
        console.print(f"distilled  {text(result.distillation)}")
    if result.unread_tokens and result.encodings.get(Encoding.SIGN.value, 0):
        named = text(listed(result.unread_tokens, _NOTES_SHOWN))
        console.print(f"unread   special tokens that calibration did not read, so no fit covers them: {named}")
    for i, (name, note) in enumerate(() if quiet else result.notes.items()):
        if i == _NOTES_SHOWN:
            console.print(f"note     and {len(result.notes) - i} more (inspect --json, metadata peraxis.report)")
            break
        console.print(f"note     {text(name)}: {text(note)}")
