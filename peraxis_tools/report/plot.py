"""Plots of one file: axes by group and depth (Figure 2 of the paper), scales, bytes, errors. PNG or SVG.

Equal files give equal bytes, because plots have no dates and no random identifiers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import peraxis_format as pxd
from peraxis_tools.checkpoints.kinds import layer_of
from peraxis_tools.deltas.inspection import InspectResult, ModuleLine
from peraxis_tools.display.shown import times_smaller
from peraxis_tools.errors import ToolError
from peraxis_tools.inspect_details import Details
from peraxis_tools.process.optional import require
from peraxis_tools.report.console import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["plot"]

# Okabe and Ito's colours, for colour-blind readers; brown replaces their yellow, which is faint on white.
_COLOURS: Final = {"row": "#0072B2", "col": "#E69F00", "row+col": "#009E73", "tensor": "#CC79A7"}
_GROUP_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#666666")
_GREY: Final = "#666666"
_STYLE: Final[Any] = {"svg.hashsalt": "peraxis", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def plot(result: InspectResult, details: Details, path: Path, *, overwrite: bool = False) -> None:
    """Write the figure to path, in the format of its suffix. Raises ToolError for another suffix."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ToolError(f"{path}: a plot is a .png or an .svg; name it so")
    require("a plot", "matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = _panels(result, details)
    with mpl.rc_context(_STYLE):
        rows = (len(panels) + 1) // 2
        figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
        grid = figure.add_gridspec(rows, 2)
        name = _plain(result.manifest.fine_tuned.id)
        smaller = times_smaller(result.full_bytes, result.bytes)
        figure.suptitle(f"{name}   {size(result.bytes)}, {smaller}", fontsize=11)
        for i, panel in enumerate(panels):
            # An odd panel at the end takes the whole row.
            columns = slice(None) if i == 2 * rows - 2 == len(panels) - 1 else i % 2
            panel(figure.add_subplot(grid[i // 2, columns]))
        # SVG would contain the date, PNG the version of the library.
        metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
        with pxd.atomic_file(path, overwrite=overwrite) as file:
            figure.savefig(file, format=path.suffix.lower()[1:], dpi=150, metadata=metadata)


def _panels(result: InspectResult, details: Details) -> list[Callable[[Axes], None]]:
    """The panels; those of axes only if modules differ in them, because one colour gives no information."""
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _scales(axes, details),
        lambda axes: _bytes(axes, result),
    ]
    if details.relative:
        panels.append(lambda axes: _relative_errors(axes, details))
    if details.errors:
        panels.append(lambda axes: _errors(axes, details))
    if len({axis for line in _signed(result) for axis in line.axes}) != 1:
        panels.append(lambda axes: _axes_by_group(axes, result))
        panels.append(lambda axes: _axes_by_depth(axes, result))
    return panels


def _plain(value: str) -> str:
    """Text from a file, safe for a label: printable, and without mathematics between dollar signs."""
    shown = "".join(c if c.isprintable() else "?" for c in value).replace("$", r"\$")
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _whole_numbers(axis: Axis) -> None:
    """Set ticks only at integers."""
    from matplotlib.ticker import MaxNLocator

    locator = axis.get_major_locator()
    if isinstance(locator, MaxNLocator):
        locator.set_params(integer=True)


def _stacked(axes: Axes, labels: Sequence[object], counts: Sequence[Counter[str]]) -> None:
    positions = range(len(labels))
    bottom = [0] * len(labels)
    for axis, colour in _COLOURS.items():
        heights = [count[axis] for count in counts]
        if any(heights):
            axes.bar(positions, heights, 0.8, bottom=bottom, label=axis, color=colour)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_ylabel("components")
    _whole_numbers(axes.yaxis)
    if any(bottom):
        axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    else:
        axes.text(0.5, 0.5, "no sign modules", ha="center", transform=axes.transAxes)


def _signed(result: InspectResult) -> list[ModuleLine]:
    return [line for line in result.modules if line.axes]


def _axes_by_group(axes: Axes, result: InspectResult) -> None:
    counts: dict[str, Counter[str]] = {}
    for line in _signed(result):
        counts.setdefault(line.group, Counter()).update(line.axes)
    _stacked(axes, list(counts), list(counts.values()))
    axes.set_xticks(range(len(counts)), [_plain(name) for name in counts], rotation=30, ha="right")
    axes.set_title("Axis by group", loc="right")


def _axes_by_depth(axes: Axes, result: InspectResult) -> None:
    counts: dict[int, Counter[str]] = {}
    for line in _signed(result):
        layer = layer_of(line.name)
        if layer is not None:
            counts.setdefault(layer, Counter()).update(line.axes)
    layers = sorted(counts)
    _stacked(axes, layers, [counts[layer] for layer in layers])
    step = max(1, len(layers) // 8)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    axes.set_title("Axis by depth", loc="right")


def _scales(axes: Axes, details: Details) -> None:
    by_group: dict[str, list[tuple[int, float, float, float]]] = {}
    for line in details.scales:
        if line.layer is not None and line.median > 0.0:
            by_group.setdefault(line.group, []).append((line.layer, line.low, line.median, line.high))
    colours = _group_colours(details)
    for name, points in by_group.items():
        points.sort()
        layers, low, median, high = zip(*points, strict=True)
        colour = colours[name]
        axes.plot(layers, median, label=_plain(name), color=colour, lw=1.6, marker="." if len(layers) < 16 else "")
        for edge in (low, high):
            axes.plot(layers, edge, color=colour, lw=0.7, alpha=0.6, ls=(0, (4, 2)))
    axes.set_xlabel("layer")
    axes.set_ylabel("|scale|")
    axes.set_title("Scales by depth: median, dashed 5% and 95%", loc="right")
    if by_group:
        axes.set_yscale("log")
        _whole_numbers(axes.xaxis)
        _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    axes.legend(
        frameon=False,
        fontsize=7,
        ncols=7,
        handlelength=1.2,
        columnspacing=1.0,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        borderaxespad=0,
    )


def _group_colours(details: Details) -> dict[str, str]:
    """The colour of each group, the same in all panels, in the order of the file."""
    names = dict.fromkeys(line.group for line in details.scales)
    return {name: _GROUP_COLOURS[i % len(_GROUP_COLOURS)] for i, name in enumerate(names)}


def _bytes(axes: Axes, result: InspectResult) -> None:
    shares = [*result.by_kind]
    labels = [share.label for share in shares] + ["assets, header"]
    sizes = [share.bytes for share in shares] + [result.asset_bytes + result.overhead_bytes]
    unit, name = (1e6, "MB") if max(sizes) >= 1e6 else (1e3, "kB")
    bars = axes.barh(labels, [count / unit for count in sizes], color=_COLOURS["row"])
    axes.bar_label(bars, [size(count) for count in sizes], padding=3, fontsize=8, color=_GREY)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"{name} in the file")
    axes.set_title("Bytes by kind", loc="right")


def _relative_errors(axes: Axes, details: Details) -> None:
    _by_module(axes, details, {name: 100 * share for name, share in details.relative.items()})
    axes.set_ylabel("% of the base's output error")
    axes.set_title("Relative error by module", loc="right")


def _errors(axes: Axes, details: Details) -> None:
    _by_module(axes, details, details.errors)
    axes.set_ylabel("mean square of the output's error")
    axes.set_title("Error by module, as compress noted it", loc="right")


def _by_module(axes: Axes, details: Details, values: Mapping[str, float]) -> None:
    """Plot a point for each module: its layer and its value, with a colour for each group."""
    groups = {line.name: line.group for line in details.scales}
    points = [(layer_of(name), error, groups.get(name, "other")) for name, error in values.items()]
    for group, colour in {**_group_colours(details), "other": _GREY}.items():
        chosen = [(layer if layer is not None else -1, error) for layer, error, kind in points if kind == group]
        if chosen:
            layers, errors = zip(*chosen, strict=True)
            axes.scatter(layers, errors, s=14, label=_plain(group), color=colour)
    _whole_numbers(axes.xaxis)
    if all(error > 0.0 for _, error, _ in points):
        axes.set_yscale("log")
    axes.set_xlabel("layer (-1: outside of the layers)" if any(layer is None for layer, _, _ in points) else "layer")
    _legend_below(axes)
