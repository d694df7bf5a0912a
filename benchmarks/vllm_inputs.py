"""The pairs of the vLLM benchmarks: a random one of any size, or a real one with relatives of its fine-tune.

--pair BASE FINE_TUNED      folders; v1 is FINE_TUNED, and v2, v3, ... are FINE_TUNED with noise of half the size of
                            its difference to BASE, each compressed by itself
without it                  random weights of --hidden, --layers and --vocabulary
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peraxis_tools
from peraxis_tools.compress import CompressOptions
from tests.engines.pair import make_base, make_delta

__all__ = ["Inputs", "add_arguments", "make_inputs"]

_NOISE: Final = 0.5  # of the standard deviation of each tensor's difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Paths by the names v1, v2, ...; applied: the folders that `apply` writes."""

    base: str
    deltas: dict[str, str]
    applied: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser, *, hidden: int, layers: int, vocabulary: int) -> None:
    """Add the options that choose a pair."""
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("BASE", "FINE_TUNED"), help="folders of a real pair")
    parser.add_argument("--hidden", type=int, default=hidden, help="of a random pair")
    parser.add_argument("--layers", type=int, default=layers, help="of a random pair")
    parser.add_argument("--vocabulary", type=int, default=vocabulary, help="of a random pair")


def make_inputs(options: argparse.Namespace, folder: Path, *, variants: int, applied: int) -> Inputs:
    """Make the deltas of a pair, and the applied folders of the first ones."""
    base = options.pair[0].resolve() if options.pair else _random_base(options, folder / "base")
    deltas = {}
    for number in range(1, variants + 1):
        path = folder / f"v{number}.pxd"
        if options.pair:
            _compress(base, options.pair[1], path, number)
        else:
            make_delta(path, base, seed=number, masks=1)
        deltas[f"v{number}"] = str(path)
    folders = {name: str(folder / name) for name in list(deltas)[:applied]}
    for name, output in folders.items():
        peraxis_tools.apply(base, deltas[name], output)
    return Inputs(base=str(base), deltas=deltas, applied=folders)


def _random_base(options: argparse.Namespace, folder: Path) -> Path:
    return make_base(
        folder,
        tied=False,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        vocab_size=options.vocabulary,
    )


def _compress(base: Path, fine_tuned: Path, output: Path, number: int) -> None:
    source = fine_tuned if number == 1 else _with_noise(base, fine_tuned, output.with_suffix(".folder"), number)
    peraxis_tools.compress(base, source, output, options=CompressOptions(fit="none"))
    if source != fine_tuned:
        shutil.rmtree(source)


def _with_noise(base: Path, fine_tuned: Path, output: Path, seed: int) -> Path:
    shutil.copytree(fine_tuned, output, ignore=shutil.ignore_patterns("*.safetensors"))
    before = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    generator = torch.Generator().manual_seed(seed)
    for path in fine_tuned.glob("*.safetensors"):
        tensors = dict(_noisy(load_file(path), before, generator))
        save_file(tensors, output / path.name, metadata={"format": "pt"})
    return output


def _noisy(
    tensors: dict[str, Tensor], before: dict[str, Tensor], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in sorted(tensors.items()):
        size = _NOISE * (tensor.float() - before[name].float()).std(correction=0)
        yield name, (tensor + size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
