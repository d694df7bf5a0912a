"""Check each way of using a delta of one model against the reference. Each check is one cell of the table."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tiny_models import build, inputs, logits
from torch import Tensor, nn

import peraxis
import peraxis_format as pxd
from peraxis_format.errors import LiveModelError
from peraxis_format.ops.tensors import as_bytes
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.convert import to_lora
from peraxis_tools.errors import ToolError, error_line

__all__ = ["CHECKS", "RIGHT", "WRONG", "check_family"]

RIGHT: Final = "right"
WRONG: Final = "WRONG"
REFUSALS: Final = (pxd.PxdError, LiveModelError, pxd.CheckpointError, ToolError)
_STEP: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A base, its fine-tune and their delta. applied: the folder that `apply` writes. kind: the model's class."""

    kind: Any
    dtype: torch.dtype
    base: Path
    tuned: Path
    delta: Path
    applied: Path

    def model(self, folder: Path) -> Any:
        """Load the model of a folder with transformers."""
        return self.kind.from_pretrained(folder, dtype=self.dtype).eval()


class WrongError(Exception):
    """A result differs from the reference."""


def check_family(family: str, folder: Path) -> dict[str, str]:
    """Run all checks on one family. Returns check -> "right", a one-line refusal, or WRONG and the reason."""
    found: dict[str, str] = {}
    pairs = {}
    for dtype in (torch.bfloat16, torch.float32):
        place = folder / str(dtype).removeprefix("torch.")
        place.mkdir(parents=True)
        try:
            pairs[dtype] = write_pair(family, place, dtype)
        except Exception as error:  # a model that transformers cannot build is not a failure of peraxis
            return {"build": f"{type(error).__name__}: {error_line(error)}"}
    found["build"] = RIGHT
    for name, (check, dtypes) in CHECKS.items():
        failed = any(found.get(earlier, RIGHT) != RIGHT for earlier in ("compress", "apply"))
        found[name] = "-" if failed else outcome(check, [pairs[dtype] for dtype in dtypes])
    return found


def write_pair(family: str, folder: Path, dtype: torch.dtype) -> Pair:
    """Save a random model, and the same model with every floating-point tensor changed, with transformers.

    The fine-tune runs once, because a model that cannot run has no results to compare. Raises ValueError if its
    logits are not finite.
    """
    with quiet():
        model: Any = build(family, dtype)
        pair = Pair(
            kind=type(model),
            dtype=dtype,
            base=folder / "base",
            tuned=folder / "tuned",
            delta=folder / "d.pxd",
            applied=folder / "applied",
        )
        model.save_pretrained(pair.base)
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in {id(value): value for value in model.state_dict().values()}.values():
                if tensor.is_floating_point():
                    tensor += (_STEP * torch.randn(tensor.shape)).to(tensor.dtype)
        model.save_pretrained(pair.tuned)
        again = pair.model(pair.tuned)
        if keep_what_loading_sets(model, again):
            model.save_pretrained(pair.tuned)
        if not bool(logits(again, inputs(again, 1)).isfinite().all()):
            raise ValueError("its logits are not finite")
    return pair


@torch.no_grad()
def keep_what_loading_sets(model: nn.Module, loaded: nn.Module) -> bool:
    """Copy the values that transformers changes on loading into `model`. Returns whether there are any."""
    values = loaded.state_dict()
    changed = [
        (tensor, values[name])
        for name, tensor in model.state_dict().items()
        if name in values and not torch.equal(tensor, values[name].to(tensor.dtype))
    ]
    for tensor, value in changed:
        tensor.copy_(value)
    return bool(changed)


def outcome(check: Callable[[Pair], None], pairs: Sequence[Pair]) -> str:
    """Run one check on all pairs. Returns its outcome in one line."""
    try:
        with quiet():
            for pair in pairs:
                check(pair)
    except REFUSALS as error:
        return error_line(error)
    except WrongError as error:
        return f"{WRONG}: {error_line(error)}"
    except Exception as error:
        return f"{WRONG}: {type(error).__name__}: {error_line(error)}"
    return RIGHT


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and standard output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# --- the checks ------------------------------------------------------------------------------------------


def compress(pair: Pair) -> None:
    """Compress without calibration and verify against the base. A tiny model saves little, so `force` is set."""
    peraxis.compress(pair.base, pair.tuned, pair.delta, force=True)
    peraxis.verify(pair.delta, base=pair.base)


def apply(pair: Pair) -> None:
    """The applied folder has the bytes of the reference arithmetic, and transformers loads every tensor of it."""
    peraxis.apply(pair.base, pair.delta, pair.applied)
    with pxd.open(pair.delta) as file, open_checkpoint(pair.base) as base, open_checkpoint(pair.applied) as applied:
        for entry in file.manifest.modules:
            source = base.tensors.read(entry.name) if entry.base is not None else None
            expected = pxd.reconstruct(file.load(entry.name), source, backend="numpy")
            if expected.tobytes() != applied.tensors.read(entry.name).tobytes():
                raise WrongError(f"{entry.name} is not what the reference gives")
    same_weights(pair.model(pair.applied), loaded_again(pair))


def loaded_again(pair: Pair) -> nn.Module:
    """Load the applied model with another seed: a tensor that transformers does not find is random and differs."""
    torch.manual_seed(7)
    model: nn.Module = pair.model(pair.applied)
    return model


def load(pair: Pair) -> None:
    """`load_model` returns the model of the applied folder."""
    same_weights(peraxis.load_model(pair.base, pair.delta, dtype=pair.dtype), pair.model(pair.applied))


def apply_live(pair: Pair) -> None:
    """A live base becomes the model of the applied folder."""
    model = pair.model(pair.base)
    peraxis.apply_(model, pair.delta)
    same_weights(model, pair.model(pair.applied))


def switch(pair: Pair) -> None:
    """The switch goes to the variant, back to the base and to the variant again, bit for bit."""
    model = pair.model(pair.base)
    with peraxis.VariantSwitch(model) as variants:
        variants.add("tuned", pair.delta)
        for name, folder in (("tuned", pair.applied), (None, pair.base), ("tuned", pair.applied)):
            variants.use(name)
            same_weights(model, pair.model(folder))


def serve_exact(pair: Pair) -> None:
    """In a mixed batch in F32 each sequence has the logits of its own model."""
    serve(pair, 2e-3)


def serve_half(pair: Pair) -> None:
    """In a mixed batch in BF16 the tolerance is wider, because rounding may route a token to another expert."""
    serve(pair, 0.5)


def serve(pair: Pair, tolerance: float) -> None:
    """Compare rows of a mixed batch with their own models. tolerance: a share of the fine-tune's largest change."""
    model = pair.model(pair.base)
    given = inputs(model, 4)
    base, tuned = logits(model, given), logits(pair.model(pair.applied), given)
    scale = float((tuned - base).abs().max())
    with peraxis.serve(model, {"tuned": pair.delta}) as served:
        with served.using("tuned"):
            alone = logits(model, given)
        near(alone, tuned, tolerance * scale, "all rows of one variant")
        with served.using(["tuned", None, "tuned", None]):
            mixed = logits(model, given)
        expected = torch.stack([tuned[0], base[1], tuned[2], base[3]])
        near(mixed, expected, tolerance * scale, "a mixed batch")
    near(logits(model, given), base, 0.0, "the base after serving")


def lora(pair: Pair) -> None:
    """PEFT loads a full-rank adapter and gives the logits of the tensors that the export reports as carried."""
    import peft
    from safetensors.torch import load_file, save_file

    folder = pair.delta.parent
    result = to_lora(pair.delta, folder / "adapter", rank=4096, base=pair.base)
    lost = {item.name for item in result.left_out}
    before, after = (tensors_of(source, load_file) for source in (pair.base, pair.applied))
    expected = folder / "carried"
    expected.mkdir()
    save_file(
        {name: before[name] if name in lost and name in before else tensor for name, tensor in after.items()},
        expected / "model.safetensors",
        metadata={"format": "pt"},
    )
    (expected / "config.json").write_bytes((pair.base / "config.json").read_bytes())
    adapted = peft.PeftModel.from_pretrained(pair.model(pair.base), str(folder / "adapter")).eval()
    given = inputs(pair.model(pair.base), 2)
    want, base = logits(pair.model(expected), given), logits(pair.model(pair.base), given)
    near(logits(adapted, given), want, 1e-2 * float((want - base).abs().max()), "the adapter")


def tensors_of(folder: Path, load_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


_BOTH: Final = (torch.bfloat16, torch.float32)
CHECKS: Final[Mapping[str, tuple[Callable[[Pair], None], tuple[torch.dtype, ...]]]] = {
    "compress": (compress, _BOTH),
    "apply": (apply, _BOTH),
    "load": (load, _BOTH[:1]),
    "apply_": (apply_live, _BOTH[:1]),
    "switch": (switch, _BOTH[:1]),
    "serve BF16": (serve_half, _BOTH[:1]),
    "serve F32": (serve_exact, _BOTH[1:]),
    "LoRA": (lora, _BOTH[1:]),
}


def same_weights(model: nn.Module, expected: nn.Module) -> None:
    """Raise WrongError unless names, dtypes, shapes and bits of all tensors are equal."""
    left, right = model.state_dict(), expected.state_dict()
    if left.keys() != right.keys():
        raise WrongError(f"names differ: {sorted(left.keys() ^ right.keys())[:3]}")
    for name, tensor in left.items():
        other = right[name]
        alike = tensor.dtype == other.dtype and tensor.shape == other.shape
        if not alike or not torch.equal(as_bytes(tensor), as_bytes(other)):
            raise WrongError(f"{name} differs")


def near(found: Tensor, expected: Tensor, tolerance: float, label: str) -> None:
    """Raise WrongError if shapes differ or a logit differs by more than the tolerance."""
    distance = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    if not distance <= tolerance:
        raise WrongError(f"{label}: logits differ by {distance:.3g}, more than {tolerance:.3g}")
