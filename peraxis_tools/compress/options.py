"""The options of a compression in one frozen object, read from the command line or YAML, written to the manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from peraxis_format.arguments import did_you_mean
from peraxis_tools.arguments import check_choice
from peraxis_tools.checkpoints.positions import DEFAULT_LENGTH
from peraxis_tools.compress.option_values import AUTO, named, texts, typed
from peraxis_tools.compress.recipes import RECIPES
from peraxis_tools.errors import OptionError
from peraxis_tools.texts.samples import without_folders
from peraxis_tools.yaml_file import read_mapping

__all__ = [
    "AUTO",
    "AXES",
    "EMBEDDINGS",
    "EVERYTHING",
    "FITS",
    "OF_DISTILLATION",
    "OF_TEXT",
    "PREFER",
    "RECIPES",
    "SAMPLES_MOST",
    "CompressOptions",
    "OptionError",
    "read_yaml",
]

FITS: Final = ("auto", "none", "closed-form", "refined", "adamw")
AXES: Final = ("auto", "row", "col", "row+col", "tensor")
EMBEDDINGS: Final = ("auto", "sign", "full")
PREFER: Final = ("size", "speed")
SAMPLES_MOST: Final = 50
EVERYTHING: Final = ".*"  # a value of `exact`
_COMPUTE: Final = ("auto", "float32", "bfloat16", "float16")
_LOSSES: Final = ("kl", "mse")
# Options of the machine and the process; the bytes of the file do not depend on them.
_NOT_CONTENT: Final = ("device", "resume", "hidden_limit", "logits_limit")
OF_DISTILLATION: Final = (
    "distill_epochs",
    "distill_batch_size",
    "distill_lr",
    "distill_sign_lr",
    "distill_full_lr",
    "distill_loss",
)
OF_TEXT: Final = (
    "calibration",
    "distill_samples",
    "text_column",
    "calibration_samples",
    "generated_samples",
    "sequence_length",
    "held_out",
    "batch_size",
    "seed",
    "compute_dtype",
    *OF_DISTILLATION,
    *_NOT_CONTENT,
)
"""The options that have no effect without a fit on text."""
_RATE_MIN: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """The options of `compress`. Sizes are bytes.

    fit            none: mean |delta|, without text; closed-form: scales from the calibration text; refined: signs
                   too; adamw: the paper's method; auto: refined if a calibration text is given, else none
    axis           the axis of the scales; auto takes the best one for each module
    masks          the number of sign masks (components) of each module, 1 to 8; auto: one, and with embeddings auto
                   the bytes of this plan are spent where they help most
    target_size    the size of the file; or target_ratio, the fine-tuned size over it. Masks go where they help most
    exact          None; a regular expression: the tensors that it finds are stored losslessly, as `same`, an exact
                   update or `full`, the smallest of them (.* means all: a lossless file); auto: the tensors that
                   are smaller losslessly than as signs
    prefer         how exact updates are written: size, with the fewest bytes; speed, for the fastest application
    embeddings     how embed_tokens and lm_head are stored: sign (with `masks`), full (exact), auto (sign; with more
                   masks if `masks` is auto)
    calibration    c4, a `datasets` id, or a file of json, jsonl, txt, csv (each also .gz) or parquet; or several of
                   them, each with a weight if one is wanted: ("c4:0.5", "chat.jsonl:0.5")
    calibration_samples  samples of the text. None means as many as the model needs, 50 at most (plan/sample_count.py)
    held_out       the share of the calibration samples that is kept for validation: of a single text's fit, and of the
                   distillation. Several texts, as are the generated samples, validate each other
    generated_samples  samples that the fine-tuned model generates; they are added to the text, as its own domain. None
                   means as many as of the text (16 at most without distillation), if the checkpoint fits into
                   `hidden_limit`; and none otherwise or for the paper's fit
    distill_samples  samples for the end-to-end distillation of all scales afterwards; 0 means none
    distill_lr     the learning rate of the scales, relative to their size; distill_sign_lr: that of the signs (0 keeps
                   them); distill_full_lr: that of tensors stored full, relative to their size (0 keeps them exact)
    hidden_limit   hidden states above this size go to disk; logits_limit: teacher states above this are recomputed
    resume         continue a killed run of the same inputs and options
    """

    fit: str = "auto"
    axis: str = "auto"
    masks: int | Literal["auto"] = AUTO
    target_size: int | None = None
    target_ratio: float | None = None
    exact: str | None = None
    prefer: Literal["size", "speed"] = "size"
    embeddings: str = "auto"
    calibration: str | tuple[str, ...] | None = None
    text_column: str | None = None
    calibration_samples: int | None = None
    generated_samples: int | None = None
    sequence_length: int = DEFAULT_LENGTH
    held_out: float = 0.2
    batch_size: int = 8
    seed: int = 0
    refine_rounds: int = 3
    distill_samples: int = 0
    distill_epochs: int = 5
    distill_batch_size: int = 2
    distill_lr: float = 1e-2
    distill_sign_lr: float = 0.0
    distill_full_lr: float = 0.0
    distill_loss: str = "kl"
    device: str = "auto"
    compute_dtype: str = "auto"
    hidden_limit: int = 4 << 30
    logits_limit: int = 4 << 30
    resume: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("fit", FITS),
            ("axis", AXES),
            ("embeddings", EMBEDDINGS),
            ("prefer", PREFER),
            ("compute_dtype", _COMPUTE),
            ("distill_loss", _LOSSES),
        ):
            check_choice(name, getattr(self, name), allowed)
        if self.masks != AUTO and not (isinstance(self.masks, int) and 1 <= self.masks <= 8):
            raise OptionError(f"masks {self.masks}: must be 1 to 8")
        if self.target_ratio is not None and not 1 < self.target_ratio <= 1e6:
            raise OptionError(f"target_ratio {self.target_ratio:g}: must be above 1, up to 1000000; 12 means a twelfth")
        for name, least, most in (
            ("calibration_samples", 1, 1 << 24),
            ("sequence_length", 2, 1 << 24),
            ("batch_size", 1, 1 << 16),
            ("refine_rounds", 1, 64),
            ("distill_samples", 0, 1 << 24),
            ("generated_samples", 0, 1 << 24),
            ("distill_batch_size", 1, 1 << 16),
            ("distill_epochs", 1, 1 << 16),
            ("seed", 0, 1 << 32),
            ("distill_lr", _RATE_MIN, 1e6),
            ("distill_sign_lr", 0.0, 1e6),
            ("distill_full_lr", 0.0, 1e6),
            ("target_size", 1, 1 << 53),
            ("hidden_limit", 0, 1 << 60),
            ("logits_limit", 0, 1 << 60),
        ):
            if getattr(self, name) is not None and not least <= getattr(self, name) <= most:
                raise OptionError(f"{name} {getattr(self, name)}: must be {least:.16g} to {most:.16g}")
        if not 0.0 <= self.held_out < 1.0:
            raise OptionError(f"held_out {self.held_out}: must be at least 0 and below 1")
        if self.calibration is None and self.fit != "none" and (self.fit != "auto" or self.distill_samples):
            raise OptionError("this fit needs a text; give calibration (--calibration c4, a datasets id, or a file)")
        if self.target_size is not None and self.target_ratio is not None:
            raise OptionError("target_size (--target-size) excludes target_ratio (--target-ratio); give one of them")
        self._check_exact()
        if self.fit == "adamw" and (self.least_masks > 1 or self.has_target):
            raise OptionError("fit adamw is the paper's: one mask a module, no target")
        if self.masks != AUTO and self.has_target:
            raise OptionError("masks and a target size exclude each other: the target decides the masks of each module")
        for name in ("distill_sign_lr", "distill_full_lr"):
            if 0.0 < getattr(self, name) < _RATE_MIN:
                raise OptionError(f"{name} {getattr(self, name)}: must be 0, or at least {_RATE_MIN:g}")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raise OptionError for an option that is not at its default but has no effect with the others."""
        if self.resolved_fit == "none":
            self._refuse(OF_TEXT, "without a fit on text" if self.fit == "auto" else f"with fit {self.fit}")
        if not self.distill_samples:
            self._refuse(OF_DISTILLATION, "without distill_samples (--distill-samples)")
        if self.resolved_fit != "refined":
            self._refuse(("refine_rounds",), f"with fit {self.resolved_fit}")
        if self.exact == EVERYTHING:
            self._refuse(("axis", "masks", "embeddings"), "in a lossless file (--exact)")

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise OptionError(f"{name} does nothing {why}; leave it out")

    def _check_exact(self) -> None:
        if self.exact is None:
            self._refuse(("prefer",), "without exact (--exact)")
            return
        try:
            re.compile(self.exact)
        except re.error as error:
            raise OptionError(f"exact {self.exact!r}: not a regular expression: {error}") from None
        if self.has_target:
            raise OptionError("exact and a target size exclude each other: a lossless file has one size")
        if self.exact == EVERYTHING and self.resolved_fit != "none":
            raise OptionError(
                "a lossless file needs no text; leave out calibration (--calibration), or name tensors for exact"
            )

    def is_exact(self, name: str) -> bool:
        """Whether this tensor is to be stored losslessly; `auto` decides when it reads the data."""
        return self.exact not in (None, AUTO) and re.search(str(self.exact), name) is not None

    @property
    def least_masks(self) -> int:
        """The number of masks of each module, before any bytes are spent."""
        return 1 if self.masks == AUTO else self.masks

    @property
    def text_samples(self) -> int:
        """The samples of the text; before the model is known (`with_text`), the most that it may need."""
        return SAMPLES_MOST if self.calibration_samples is None else self.calibration_samples

    @property
    def calibration_share(self) -> float:
        """The share of the samples that the fit takes; distillation alone takes the others."""
        return self.text_samples / (self.text_samples + self.distill_samples)

    @property
    def has_target(self) -> bool:
        """Whether a byte budget decides the masks of each module."""
        return self.target_size is not None or self.target_ratio is not None

    @property
    def spends_freely(self) -> bool:
        """Whether the bytes of the plan are spent where they lower the error most, as nothing else is asked for."""
        plain = self.masks == AUTO and self.embeddings == "auto" and self.exact is None
        return plain and not self.has_target and self.resolved_fit != "adamw"

    @property
    def resolved_fit(self) -> str:
        """The fit, with `auto` replaced by its choice."""
        if self.fit != "auto":
            return self.fit
        return "none" if self.calibration is None else "refined"

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> CompressOptions:
        """Options from a mapping (YAML, JSON); `-` and `_` are equal, `recipe` names a set of RECIPES.

        Raises OptionError for unknown keys, and for an option that is given under two names.
        """
        recipe = values.get("recipe")
        if recipe is not None:
            check_choice("recipe", recipe, RECIPES)
        given: dict[str, Any] = {} if recipe is None else dict(RECIPES[recipe])
        options = named(values)
        _refuse_unknown(options)
        for name, value in options.items():
            if name == "recipe":
                continue
            default = cls.__dataclass_fields__[name].default
            given[name] = texts(value) if name == "calibration" else typed(name, value, default)
        return cls(**given)

    @classmethod
    def from_yaml(cls, path: Path) -> CompressOptions:
        """Options from a YAML file. Raises OptionError if it is not a mapping of known keys and allowed values."""
        values = read_yaml(path)
        try:
            return cls.from_mapping(values)
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from None

    def content(self) -> dict[str, Any]:
        """The options that determine the bytes of the file, for the manifest and for resuming; floats as strings."""
        chosen = asdict(self) | {"calibration": without_folders(self.calibration)}
        values = {name: value for name, value in chosen.items() if name not in _NOT_CONTENT}
        return {name: repr(value) if isinstance(value, float) else value for name, value in values.items()}

    def canonical_json(self) -> str:
        """`content` as canonical JSON. Law: from_mapping(json.loads(o.canonical_json())).content() == o.content()."""
        return json.dumps(self.content(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) file that holds one mapping, by the names of options. Raises OptionError otherwise."""
    options = named(read_mapping(path))
    _refuse_unknown(options, where=f"{path}: ")
    return options


def _refuse_unknown(names: Iterable[str], *, where: str = "") -> None:
    known = sorted((*(_dashed(field.name) for field in fields(CompressOptions)), "recipe"))
    for name in names:
        if _dashed(name) not in known:
            hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            raise OptionError(f"{where}unknown option {name!r}{hint}")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
