"""`peraxis-tools merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

import peraxis_format as pxd
from peraxis_tools.commands.options import (
    Finite,
    json_option,
    overwrite_option,
    quiet_option,
    refuse_given,
)
from peraxis_tools.commands.sources import fetched
from peraxis_tools.deltas.parts import is_part
from peraxis_tools.display.progress import StageOpener, staged
from peraxis_tools.errors import ToolError
from peraxis_tools.merge import MergeResult, Method, Mixture, merge, merge_parts
from peraxis_tools.remote.files import deltas_of
from peraxis_tools.remote.urls import without_secrets
from peraxis_tools.report.console import emit
from peraxis_tools.report.merge import render_merge

__all__ = ["command"]


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(item) for item in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 0.7,0.3") from None


@click.command("merge")
@click.argument("deltas", metavar="A B ...", nargs=-1, required=True)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The .pxd to write.")
@click.option(
    "--weights", metavar="W,W,...", callback=_numbers, help="One weight for each delta. A weight may be negative."
)
@click.option(
    "--masks", type=click.INT, help=f"Fit the sum into this many masks for each module, 1 to {pxd.COMPONENTS_MAX}."
)
@click.option("--method", type=click.Choice(["linear", "ties", "dare"]), help="The method, with the names of mergekit.")
@click.option("--density", default=0.5, show_default=True, type=Finite(1e-6, 1), help="The density of ties and dare.")
@click.option(
    "--normalize/--no-normalize", default=None, help="Divide by the sum of the weights.  [default: for linear and ties]"
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="The seed of dare.")
@click.option(
    "--base",
    metavar="FOLDER|ID",
    help="The base. It is needed for exact tensors, except for a sum of equal whole ones with weights that sum to 1.",
)
@click.option("--name", help="The name of the merged checkpoint.")
@overwrite_option
@json_option
@quiet_option
def command(
    deltas: tuple[str, ...],
    output: Path,
    weights: tuple[float, ...] | None,
    masks: int | None,
    method: Method | None,
    density: float,
    normalize: bool | None,
    seed: int,
    base: str | None,
    name: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge deltas on one base into one: either the parts of one delta, or a weighted sum.

    Without --masks a sum keeps every mask. It is exact except for one rounding of the scales to F16. With --masks it
    is fitted into that many masks, and the error is shown. Rows that the base lacks, those of new tokens, become the
    weighted mean. Parts (see `split`) need neither weights nor a method. A folder means every .pxd in it.

    \b
    Example: peraxis-tools merge code.pxd chat.pxd --weights 0.7,0.3 -o both.pxd
             peraxis-tools merge code.pxd chat.pxd --method ties --masks 2 --base BASE -o both.pxd
             peraxis-tools merge parts -o delta.pxd
    """
    step = staged(quiet=quiet)
    names = [name for source in deltas for name in deltas_of(source)]
    with fetched(names, quiet=quiet) as paths:
        manifests = [_manifest(path) for path in paths]
        parts = [path for path, manifest in zip(paths, manifests, strict=True) if is_part(manifest)]
        if len(parts) == len(paths):
            others = ("weights", "method", "masks", "density", "normalize", "seed", "base", "name")
            refuse_given(*others, why="for parts of one delta, which are joined unchanged")
            result = merge_parts(paths, output, overwrite=overwrite, progress=step)
        else:
            if method not in ("ties", "dare"):
                refuse_given("density", why="without --method ties or dare")
            if method != "dare":
                refuse_given("seed", why="without --method dare")
            mixture = Mixture(method=method or "sum", density=density, normalize=normalize, seed=seed)
            if parts:
                raise ToolError(f"{parts[0]}: is a part of a delta; join all of its parts first, without other files")
            if weights is None and mixture.method == "sum":
                updates = all(manifest.result is not None for manifest in manifests)
                kind = "updates of a chain; fold them with compact, or" if updates else "whole deltas;"
                raise ToolError(f"these are {kind} pass --weights (one for each) or --method")
            result = _sum(paths, output, weights, mixture, masks, base, name, overwrite, step)
    given = {str(path): without_secrets(str(name)) for path, name in zip(paths, names, strict=True)}
    inputs = tuple(dataclasses.replace(part, path=given[part.path]) for part in result.inputs)
    result = dataclasses.replace(result, inputs=inputs)
    emit(result, render_merge, schema="peraxis.merge/1", as_json=as_json, written=output)


def _manifest(path: Path) -> pxd.Manifest:
    with pxd.open(path) as file:
        return file.manifest


def _sum(
    paths: list[Path],
    output: Path,
    weights: tuple[float, ...] | None,
    mixture: Mixture,
    masks: int | None,
    base: str | None,
    name: str | None,
    overwrite: bool,
    step: StageOpener,
) -> MergeResult:
    return merge(
        paths,
        output,
        weights=weights if weights is not None else (1.0,) * len(paths),
        mixture=mixture,
        masks=masks,
        base=base,
        name=name,
        overwrite=overwrite,
        progress=step,
    )
