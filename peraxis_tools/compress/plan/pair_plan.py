"""The plan of a checkpoint pair, for a run and for a dry run."""

from __future__ import annotations

from dataclasses import replace

from peraxis_tools.checkpoints.assets import left_behind
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.checkpoints.positions import checked_length
from peraxis_tools.checkpoints.vocabulary import check_tokenizer_files
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.casts import with_casts
from peraxis_tools.compress.plan.pairing import tied_pairs
from peraxis_tools.compress.plan.plan import Plan, plan
from peraxis_tools.compress.plan.sample_count import sample_count

__all__ = ["plan_pair", "with_text"]


def plan_pair(base: Checkpoint, fine_tuned: Checkpoint, options: CompressOptions) -> Plan:
    """The plan without predicted sizes. Reads the assets, and the tensors that may be casts of the base's."""
    planned = plan(
        fine_tuned={info.name: info for info in fine_tuned.tensors.infos()},
        base={info.name: info for info in base.tensors.infos()},
        options=options,
        tied=tied_pairs(fine_tuned.tensors),
    )
    foreign = [name for name in base.tensors.foreign if name not in fine_tuned.tensors]
    planned = replace(planned, dropped=tuple(sorted((*planned.dropped, *foreign))))
    planned = replace(
        planned,
        assets=tuple((path, len(data)) for path, data in fine_tuned.assets()),
        identities=(base.identity, fine_tuned.identity),
        left_behind=left_behind(fine_tuned.folder_assets()),
    )
    return with_casts(planned, base.tensors, fine_tuned.tensors)


def with_text(options: CompressOptions, fine_tuned: Checkpoint) -> CompressOptions:
    """The options with the number of samples that the model needs, and of tokens that it has positions for.

    Raises OptionError, and ToolError if the text has no tokenizer.
    """
    if options.resolved_fit == "none":
        return options
    length = checked_length(fine_tuned.config(), options.sequence_length, fine_tuned.tensors.label)
    if fine_tuned.folder is not None:
        check_tokenizer_files(fine_tuned.folder, fine_tuned.tensors.label)
    samples = options.text_samples
    # The paper's fit and distillation take steps, whose number is that of the samples.
    if options.calibration_samples is None and options.resolved_fit != "adamw" and not options.distill_samples:
        samples = sample_count(fine_tuned.tensors.infos(), length)
    return replace(options, sequence_length=length, calibration_samples=samples)
