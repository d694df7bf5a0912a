"""A report of one file as one HTML page: it works offline, sorts and filters its table, and is light or dark.

Text from the file is escaped for HTML after control and bidirectional characters have become visible escapes. A content
security policy allows only the page's own style and script.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

import peraxis_format as pxd
from peraxis_tools.checkpoints.kinds import axes_text
from peraxis_tools.deltas.calibration_text import calibration_text
from peraxis_tools.deltas.inspection import ByteShare, InspectResult, ModuleLine, needs_no_base
from peraxis_tools.display.shown import visible
from peraxis_tools.inspect_details import Details
from peraxis_tools.remote.names import HUB_ID
from peraxis_tools.report.console import size

__all__ = ["page", "write_page"]

_ASSETS: Final = Path(__file__).with_name("assets")
_AXES: Final = ("row", "col", "row+col", "tensor")


def write_page(result: InspectResult, details: Details, path: Path, *, overwrite: bool) -> None:
    """Write the page atomically."""
    with pxd.atomic_file(path, overwrite=overwrite) as file:
        file.write(page(result, details).encode())


def page(result: InspectResult, details: Details) -> str:
    """The HTML document."""
    style = (_ASSETS / "report.css").read_text("utf-8")
    script = (_ASSETS / "report.js").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    title = _text(result.manifest.fine_tuned.id)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}: PXD report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_heading(result)}{_cards(result, details)}"
        f'<div class="columns">{_bytes("Bytes by kind", result)}{_axes(result)}</div>\n'
        f"{_manifest(result)}{_table(result, details)}"
        f"</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(visible(value))


def _heading(result: InspectResult) -> str:
    base = result.manifest.base
    revision = f" at revision {_text(base.revision)}" if base.revision else ""
    if needs_no_base(result.manifest):
        made_on = "<p>an anchor, a whole state that needs no base</p>"
    else:
        made_on = f"<p>a fine-tune of {_base_link(base)}{revision}</p><p class=digest>base {_text(base.digest)}</p>"
    return (
        f"<header><p class=kicker>PXD {_text(result.version)} delta</p><h1>{_text(result.manifest.fine_tuned.id)}</h1>"
        f"{made_on}<p class=digest>file {_text(result.content_id)}</p></header>\n"
    )


def _base_link(base: pxd.BaseIdentity) -> str:
    """A link to the base's page on the hub, if its id has the form of a hub id."""
    name = f"<b>{_text(base.id)}</b>"
    if HUB_ID.fullmatch(base.id) is None:
        return name
    at = f"/tree/{quote(base.revision, safe='')}" if base.revision else ""
    return f'<a href="https://huggingface.co/{quote(base.id)}{at}" rel="noreferrer">{name}</a>'


def _fidelity(details: Details) -> tuple[tuple[str, str], ...]:
    """The output errors of modules as the compressor measured them; empty if it did not.

    They are shares of the base's output error: 0% is the fine-tune, 100% the base.
    """
    if not details.relative:
        return ()
    shares = sorted(details.relative.values())
    return (
        ("output error left, median", f"{statistics.median(shares):.2%}"),
        ("output error left, worst module", f"{shares[-1]:.2%}"),
    )


def _cards(result: InspectResult, details: Details) -> str:
    signed = sum(share.module_count for share in result.by_encoding if share.label == "sign")
    cards = (
        *_fidelity(details),
        ("file", size(result.bytes)),
        ("checkpoint", size(result.full_bytes)),
        ("smaller", f"{result.ratio:.1f} ×"),
        ("modules", f"{len(result.modules)}"),
        ("as signs", f"{signed}"),
    )
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in cards)
    return f'<dl class="cards">{items}</dl>\n'


def _bar(parts: Iterable[tuple[str, float]]) -> str:
    spans = "".join(f'<i class="{css}" style="width:{100 * share:.2f}%"></i>' for css, share in parts if share > 0)
    return f'<span class="bar">{spans}</span>'


def _bytes(title: str, result: InspectResult) -> str:
    rest = ByteShare(
        label="assets, header", module_count=0, bytes=result.asset_bytes + result.overhead_bytes, full_bytes=0
    )
    shares = (*result.by_kind, rest)
    largest = max((share.bytes for share in shares), default=0) or 1
    rows = "".join(
        f"<tr><th scope=row>{_text(share.label)}</th><td>{_bar([('bytes', share.bytes / largest)])}</td>"
        f"<td class=n>{size(share.bytes)}</td><td class=n>{_times(share)}</td></tr>"
        if share.bytes
        else f"<tr><th scope=row>{_text(share.label)}</th><td></td><td class=n>0 B</td><td class=n>-</td></tr>"
        for share in shares
    )
    return f"<section><h2>{title}</h2><table class=bars>{rows}</table></section>"


def _times(share: ByteShare) -> str:
    return f"{share.full_bytes / share.bytes:.1f} ×" if share.full_bytes and share.bytes else ""


def _axes(result: InspectResult) -> str:
    if not result.axes_by_group:
        return ""
    largest = max(sum(row.axis_counts.values()) for row in result.axes_by_group)
    rows = "".join(
        f"<tr><th scope=row>{_text(row.group)}</th><td>"
        + _bar((f"a{_AXES.index(axis)}", row.axis_counts.get(axis, 0) / largest) for axis in _AXES)
        + f"</td><td class=n>{' + '.join(map(str, row.axis_counts.values()))}</td></tr>"
        for row in result.axes_by_group
    )
    used = {axis for row in result.axes_by_group for axis in row.axis_counts}
    legend = "".join(f'<span><i class="a{i}"></i>{axis}</span>' for i, axis in enumerate(_AXES) if axis in used)
    return f"<section><h2>Axis by group</h2><p class=legend>{legend}</p><table class=bars>{rows}</table></section>"


def _manifest(result: InspectResult) -> str:
    manifest = result.manifest
    rows: dict[str, str] = {
        "base digest": manifest.base.digest,
        "written by": f"{manifest.producer.name} {manifest.producer.version}",
    }
    if manifest.calibration is not None:
        c = manifest.calibration
        rows["calibration"] = f"{calibration_text(manifest)}, {c.samples} x {c.sequence_length} tokens, seed {c.seed}"
    if manifest.tied:
        rows["tied"] = ", ".join(f"{alias} = {name}" for name, alias in manifest.tied)
    if manifest.dropped:
        rows["dropped"] = ", ".join(manifest.dropped)
    if manifest.assets:
        rows["assets"] = ", ".join(asset.path for asset in manifest.assets)
    rows |= {key: _shortened(value) for key, value in sorted(manifest.metadata.items())}
    items = "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in rows.items())
    return f"<details><summary>Manifest</summary><dl class=manifest>{items}</dl></details>\n"


def _shortened(value: str) -> str:
    return value if len(value) <= 600 else f"{value[:600]}… ({len(value)} characters)"


def _table(result: InspectResult, details: Details) -> str:
    scales = {line.name: line.median for line in details.scales}
    columns = ["module", "kind", "encoding", "axes", "shape", "dtype", "stored", "ratio, ×", "median scale"]
    if details.relative:
        columns.append("error left, %")
    if details.errors:
        columns.append("error, mean square")
    numeric = {"shape", "stored", "ratio, ×", "median scale", "error left, %", "error, mean square"}
    head = "".join(
        f"<th scope=col aria-sort=none{' class=n' if name in numeric else ''}><button type=button>{name}</button></th>"
        for name in columns
    )
    rows = "".join(_row(line, scales, details) for line in result.modules)
    return (
        "<section><h2>Modules</h2><label class=filter>Filter <input type=search placeholder=layers.0></label>"
        f"<div class=scroll><table id=modules><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        "<p id=count></p></section>\n"
    )


def _row(line: ModuleLine, scales: Mapping[str, float], details: Details) -> str:
    cells = [
        f"<td>{_text(line.name).replace('.', '.<wbr>')}</td>",  # a line may break after a dot
        _cell(line.kind),
        _cell(line.encoding),
        _cell(axes_text(line.axes) or "-"),
        _cell("×".join(map(str, line.shape)) or "scalar", math.prod(line.shape)),
        _cell(line.dtype),
        _cell(size(line.bytes), line.bytes),
        _cell(f"{line.full_bytes / line.bytes:.1f}" if line.bytes else "-", line.full_bytes / max(line.bytes, 1)),
        _number(scales.get(line.name)),
    ]
    if details.relative:
        share = details.relative.get(line.name)
        cells.append(_number(None if share is None else 100 * share))
    if details.errors:
        cells.append(_number(details.errors.get(line.name)))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: str, order: float | None = None) -> str:
    return f"<td>{_text(value)}</td>" if order is None else f'<td class=n data-v="{order:.9g}">{_text(value)}</td>'


def _number(value: float | None) -> str:
    return '<td class=n data-v="-1">-</td>' if value is None else _cell(f"{value:.3g}", value)
