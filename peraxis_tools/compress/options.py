"""Every choice of a compression, in one frozen object: from the command line, from YAML, into the manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from peraxis_tools.errors import OptionError

__all__ = ["AXES", "EMBEDDINGS", "FITS", "RECIPES", "CompressOptions", "OptionError", "parse_size"]

FITS: Final = ("auto", "none", "closed-form", "refined", "adamw")
AXES: Final = ("auto", "row", "col", "row+col", "tensor")
EMBEDDINGS: Final = ("auto", "sign", "full")
_COMPUTE: Final = ("auto", "float32", "bfloat16", "float16")
_LOSSES: Final = ("kl", "mse")
# Sets of options under a name; what is given beside one wins over it.
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "quick": {"fit": "none"},
    "fit": {},
    "distilled": {"distill_samples": 150, "generated_samples": 300},
    "best": {
        "distill_samples": 550,
        "generated_samples": 400,
        "held_out": 0.1,
        "distill_epochs": 8,
        "distill_batch_size": 4,
        "distill_sign_lr": 0.05,
        "distill_full_lr": 0.003,
    },
}
# Where a run stands and what it runs on: no part of what the bytes follow from.
_NOT_CONTENT: Final = ("device", "resume", "hidden_limit", "logits_limit")
# Of options whose default is None.
_KINDS_OF_NONE: Final[Mapping[str, type]] = {"target_ratio": float, "generated_samples": int}
# Names that options had before; files and their digests keep them.
_OTHER_NAMES: Final[Mapping[str, str]] = {"bits": "masks"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """What `compress` does. Sizes are bytes.

    fit            none: mean |delta|, no text; closed-form: scales from calibration; refined: signs too;
                   adamw: the paper's; auto: refined where a calibration text is given, else none
    axis           auto: the best for each module
    masks          sign masks (components) a module, 1 to 8; `bits` is accepted as another name
    target_size    size of the file; or target_ratio, fine-tuned size / file size: masks are spent where they pay
    embeddings     embed_tokens and lm_head: sign (`masks` of them), full (exact), auto (as many masks as pay)
    calibration    c4, a `datasets` id, or a file of json, jsonl(.gz), parquet or txt; or several of them, each
                   with a weight if one is wanted: ("c4:0.5", "chat.jsonl:0.5")
    held_out       share of the calibration samples for validation, rather than the fit
    generated_samples  samples that the fine-tuned model writes itself, added to both texts: its own domain; None: 16
                   where the whole model fits into `hidden_limit`, and else (and for the paper's fit) none
    distill_samples  samples of end-to-end distillation of all scales afterwards; 0: none
    distill_lr     learning rate of the scales, relative to their size; distill_sign_lr: of the signs (0: kept);
                   distill_full_lr: of tensors stored full, relative to theirs (0: kept exact)
    hidden_limit   hidden states beyond this go to disk; logits_limit: teacher logits on disk, beyond this recomputed
    resume         go on where a killed run of the same inputs and options stopped
    """

    fit: str = "auto"
    axis: str = "auto"
    masks: int = 1
    target_size: int | None = None
    target_ratio: float | None = None
    embeddings: str = "auto"
    calibration: str | tuple[str, ...] | None = None
    text_column: str | None = None
    calibration_samples: int = 50
    generated_samples: int | None = None
    sequence_length: int = 512
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
            ("compute_dtype", _COMPUTE),
            ("distill_loss", _LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{_dashed(name)} {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name, least, most in (
            ("masks", 1, 8),
            ("calibration_samples", 1, 1 << 24),
            ("sequence_length", 2, 1 << 24),
            ("batch_size", 1, 1 << 16),
            ("refine_rounds", 1, 64),
            ("distill_samples", 0, 1 << 24),
            ("generated_samples", 0, 1 << 24),
            ("distill_batch_size", 1, 1 << 16),
            ("distill_epochs", 1, 1 << 16),
            ("seed", 0, 1 << 32),
        ):
            if getattr(self, name) is not None and not least <= getattr(self, name) <= most:
                raise OptionError(f"{_dashed(name)} {getattr(self, name)}: must be {least} to {most}")
        if not 0.0 <= self.held_out < 1.0:
            raise OptionError(f"held-out {self.held_out}: a share, at least 0 and below 1")
        if self.calibration is None and (self.fit not in ("auto", "none") or self.distill_samples):
            raise OptionError("this fit needs a text: give --calibration (c4, a datasets id, or a file)")
        if self.target_size is not None and self.target_ratio is not None:
            raise OptionError("target-size and target-ratio: give one of them")
        if self.fit == "adamw" and (self.masks > 1 or self.has_target):
            raise OptionError("fit adamw is the paper's: one mask a module, no target")
        if self.masks > 1 and self.has_target:
            raise OptionError("masks and a target size exclude each other: the target decides the masks of each module")

    @property
    def has_target(self) -> bool:
        """Whether a byte budget decides the masks of each module."""
        return self.target_size is not None or self.target_ratio is not None

    @property
    def resolved_fit(self) -> str:
        """The fit that `auto` stands for."""
        if self.fit != "auto":
            return self.fit
        return "none" if self.calibration is None else "refined"

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> CompressOptions:
        """Options from a mapping (YAML, JSON); `-` and `_` are the same, `recipe` stands for options of RECIPES.
        Of two names of one option the later wins.

        Raises OptionError for unknown keys.
        """
        known = {field.name: field for field in fields(cls)}
        recipe = values.get("recipe", "fit")
        if recipe not in RECIPES:
            raise OptionError(f"recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
        given: dict[str, Any] = dict(RECIPES[recipe])
        for key, value in values.items():
            if key == "recipe":
                continue
            name = str(key).replace("-", "_")
            name = _OTHER_NAMES.get(name, name)
            if name not in known:
                raise OptionError(f"unknown option {key!r}; known are {', '.join(sorted(map(_dashed, known)))}")
            given[name] = _texts(value) if name == "calibration" else _typed(name, value)
        return cls(**given)

    @classmethod
    def from_yaml(cls, path: Path) -> CompressOptions:
        """Options from a YAML file. Raises OptionError for what is no mapping of known keys."""
        return cls.from_mapping(read_yaml(path))

    def content(self) -> dict[str, Any]:
        """What the bytes of the artifact follow from, for the manifest and for resuming; floats as decimal strings."""
        names = {new: old for old, new in _OTHER_NAMES.items()}
        values = {names.get(name, name): value for name, value in asdict(self).items() if name not in _NOT_CONTENT}
        return {name: repr(value) if isinstance(value, float) else value for name, value in values.items()}

    def canonical_json(self) -> str:
        """`content` as canonical JSON: `from_mapping(json.loads(...))` gives these options back."""
        return json.dumps(self.content(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) file that holds one mapping. Raises OptionError otherwise."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: not a YAML file: {str(error).splitlines()[0]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"{path}: must hold `option: value` lines, not a {type(values).__name__}")
    return values


def parse_size(text: str | int) -> int:
    """Bytes of `1200000`, `800KB`, `1.2GB` (powers of 1000) or `1GiB` (of 1024). Raises OptionError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise OptionError(f"size {text!r}: write it as 800MB, 1.2GB or 1GiB")
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _texts(value: Any) -> str | tuple[str, ...] | None:
    """One text stays a string, whatever way it came: files name it as they always have."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return None if not value else value[0] if len(value) == 1 else tuple(value)
    raise OptionError(f"calibration {value!r}: must be a text, or a list of them")


def _typed(name: str, value: Any) -> Any:
    if name == "target_size" and isinstance(value, str):
        return parse_size(value)
    default = CompressOptions.__dataclass_fields__[name].default
    kind: type = _KINDS_OF_NONE.get(name, type(default))
    if value is None or kind is type(None):
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise OptionError(f"{_dashed(name)} {value!r}: must be a {kind.__name__}")
