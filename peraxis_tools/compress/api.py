"""`compress` as it is called from Python: every option by its name and type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final, Literal, TypeAlias

from peraxis_tools.arguments import check_paths
from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.plan.plan import Plan
from peraxis_tools.compress.run.run import CompressResult
from peraxis_tools.compress.run.run import compress as run
from peraxis_tools.display.progress import StagedProgress

__all__ = ["compress"]

Recipe: TypeAlias = Literal["quick", "fit", "distilled", "best"]
Fit: TypeAlias = Literal["auto", "none", "closed-form", "refined", "adamw"]
AxisChoice: TypeAlias = Literal["auto", "row", "col", "row+col", "tensor"]
Embeddings: TypeAlias = Literal["auto", "sign", "full"]
ComputeDType: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

_CHOICES: Final = ("recipe", *(field.name for field in fields(CompressOptions)))


# fmt: off
def compress(
    base: str | Path,
    fine_tuned: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | None = None,
    fit: Fit | None = None, axis: AxisChoice | None = None,
    masks: int | Literal["auto"] | None = None,
    target_size: int | str | None = None, target_ratio: float | None = None, embeddings: Embeddings | None = None,
    exact: str | None = None, prefer: Literal["size", "speed"] | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None, text_column: str | None = None,
    calibration_samples: int | None = None,
    generated_samples: int | None = None, sequence_length: int | None = None, held_out: float | None = None,
    batch_size: int | None = None, seed: int | None = None, refine_rounds: int | None = None,
    distill_samples: int | None = None, distill_epochs: int | None = None, distill_batch_size: int | None = None,
    distill_lr: float | None = None, distill_sign_lr: float | None = None, distill_full_lr: float | None = None,
    distill_loss: Literal["kl", "mse"] | None = None,
    device: str | None = None, compute_dtype: ComputeDType | None = None,
    hidden_limit: int | str | None = None, logits_limit: int | str | None = None, resume: bool | None = None,
    options: CompressOptions | None = None,
    base_revision: str | None = None, fine_tuned_revision: str | None = None, base_id: str | None = None,
    overwrite: bool = False, force: bool = False,
    progress: StagedProgress = None,
    show_plan: Callable[[Plan], None] | None = None,
) -> CompressResult:
    # fmt: on
    """Compress a fine-tuned checkpoint against its base into the file `output`.

    base, fine_tuned: a folder, a safetensors file or a hub id. The options that most calls need:

    calibration    the text that signs and scales are fitted on: c4, a `datasets` id, or a file; without it the scales
                   are mean magnitudes, which is worse at the same size
    target_size, target_ratio  the size of the file, or the checkpoint's size over it (12: a twelfth)
    masks          masks of each module, 1 to 8; auto: one, and these bytes are spent where they help most
    exact          a regular expression of tensors that are stored bit for bit (.* all); auto: where that is smaller
    embeddings     how embed_tokens and lm_head are stored: sign, full or auto
    recipe         quick, fit, distilled or best: a set of options
    device, seed, resume  where it runs, the random choices, whether a killed run goes on

    CompressOptions explains all; they are those of the command line. None means the default, or the value of `recipe`.
    Pass either options by name or one CompressOptions as `options`. base_id: the hub id of a base that is a folder.
    force: write the delta even if it saves little. Sizes are bytes, or texts like 1.2GB.
    progress is called as progress(step, done, total); True shows bars. show_plan is called once with the plan before
    the weights are fitted.
    Raises ToolError before any work if the pair or the options are wrong.
    """
    given = locals()  # the parameters and nothing else: this is the first statement
    choices = {name: given[name] for name in _CHOICES if given[name] is not None}
    check_paths(base=base, fine_tuned=fine_tuned, output=output)
    if options is not None and choices:
        raise OptionError(f"options: pass a CompressOptions or {', '.join(choices)} by name, not both")
    return run(
        base,
        fine_tuned,
        output,
        options=options or CompressOptions.from_mapping(choices),
        base_revision=base_revision,
        fine_tuned_revision=fine_tuned_revision,
        base_id=base_id,
        overwrite=overwrite,
        force=force,
        progress=progress,
        show_plan=show_plan,
    )
