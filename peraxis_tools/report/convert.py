"""The text report of `convert`."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from peraxis_tools.convert import LoraResult, ToPxdResult, ToWireResult
from peraxis_tools.deltas.module_counts import encodings_text
from peraxis_tools.display.shown import counted
from peraxis_tools.report.console import size, text

__all__ = ["render_lora", "render_to_pxd", "render_to_wire"]

_SHOWN = 8


def render_to_pxd(result: ToPxdResult, console: Console) -> None:
    """Print the path, the modules, and the rounding errors."""
    console.print(f"[bold green]converted[/]  {text(result.path)}  {size(result.bytes)}, from {result.layout}")
    console.print(f"content    {text(result.content_id)}")
    console.print(f"modules    {encodings_text(result.encodings)}")
    rounded = f"rounded once, relative error at most {result.scale_error:.2g}"
    console.print(f"scales     {'converted exactly' if result.scale_error == 0.0 else rounded}")
    if result.merges:
        console.print(f"weights    bit for bit those of {result.layout}'s own merge")
    if result.cast:
        console.print(f"cast       {len(result.cast)} parameters to the base's dtype, {text(result.cast[0])} for one")


def render_to_wire(result: ToWireResult, console: Console) -> None:
    """Print the path and the number of changes."""
    console.print(f"[bold green]converted[/]  {text(result.path)}  {size(result.bytes)}, to {result.wire}")
    console.print(f"from       {text(result.content_id)}")
    share = f"{result.changed / result.weights:.2%}" if result.weights else "none"
    console.print(
        f"changed    {result.changed} of {result.weights} weights, {share}, in {counted(result.tensors, 'tensor')}"
    )


def render_lora(result: LoraResult, console: Console) -> None:
    """Print the path, the ranks, and the fidelity to the delta."""
    ranks = [module.rank for module in result.modules]
    console.print(f"[bold green]converted[/]  {text(result.path)}  {size(result.bytes)}, a LoRA adapter for PEFT")
    console.print(f"rank       {min(ranks)}" + (f" to {max(ranks)}" if max(ranks) > min(ranks) else ""))
    of = counted(len(result.modules), "module")
    counted_out = len(result.left_out) - result.uncounted
    of += f" and {counted_out} that are left out" if counted_out else ""
    console.print(
        f"fidelity   relative error [bold]{result.error:.4g}[/] over {of} "
        f"({100 * (1 - result.error**2):.1f}% of the square norm kept)"
    )
    if result.saved_whole:
        console.print(f"whole      {len(result.saved_whole)} exact tensors, through modules_to_save")
    if result.biases:
        console.print(f"biases     {len(result.biases)}, loaded into the base's layers (bias=all)")
    if result.uncounted:
        kinds = Counter(item.unmeasured for item in result.left_out if item.unmeasured is not None)
        console.print(
            f"uncounted  {result.uncounted} of the tensors that are left out are in no figure: "
            f"{', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
        )
    for item in result.left_out[:_SHOWN]:
        console.print(f"[yellow]left out[/]   {text(item.name)}: {text(item.reason)}")
    if len(result.left_out) > _SHOWN:
        console.print(f"           and {len(result.left_out) - _SHOWN} more")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("largest errors", "rank", "rel. error"):
        table.add_column(title, justify="left" if title.startswith("largest") else "right")
    for module in sorted(result.modules, key=lambda m: -m.error)[:_SHOWN]:
        table.add_row(text(module.name), str(module.rank), f"{module.error:.4g}")
    console.print(table)
