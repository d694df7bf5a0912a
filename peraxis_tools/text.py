"""Text to tokens: fixed-length samples without padding, the same for the same text, tokenizer and seed.

Documents are put into an order drawn from the seed, tokenised (with the special tokens that the tokenizer adds to
a document), concatenated, and cut into samples of `sequence_length`. No sample holds padding, so no sum does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_tools.errors import OptionError

__all__ = ["Ids", "Samples", "load_samples", "read_documents"]

_POOL: Final = 20  # documents read for each sample wanted, at least 1000: what the seed draws from
_LOADERS: Final = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".csv": "csv",
}


Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Token ids int64 [samples, length], where they come from, and their digest as SPEC 3.4 defines it."""

    ids: Ids
    source: str
    seed: int

    @property
    def digest(self) -> str:
        """Over the ids as 32-bit little-endian integers, sample after sample."""
        return "sha256:" + hashlib.sha256(self.ids.astype("<u4").tobytes()).hexdigest()


def read_documents(source: str, *, text_column: str | None, limit: int) -> list[str]:
    """The first `limit` documents of `c4`, a file (json, jsonl, parquet, txt, csv; also .gz), or a datasets id."""
    from datasets import load_dataset

    path = Path(source)
    try:
        if source == "c4":
            rows = load_dataset("allenai/c4", "en", split="train", streaming=True)
        elif path.exists():
            suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
            if suffix not in _LOADERS:
                raise OptionError(f"calibration {source}: not one of {', '.join(_LOADERS)} (or .gz of them)")
            kind = _LOADERS[suffix]
            extra = {"sample_by": "paragraph"} if kind == "text" else {}
            rows = load_dataset(kind, data_files=str(path.resolve()), split="train", streaming=True, **extra)
        else:
            name, _, config = source.partition(":")
            rows = load_dataset(name, config or None, split="train", streaming=True)
        return list(_texts(rows, text_column=text_column, limit=limit, source=source))
    except OptionError:
        raise
    except Exception as error:
        # `datasets` raises dozens of types, from its own to those of every file system; all mean the same here.
        detail = (str(error).splitlines() or [""])[0]
        raise OptionError(f"calibration {source}: cannot be read: {type(error).__name__}: {detail}") from error


def _texts(rows: Iterable[dict[str, Any]], *, text_column: str | None, limit: int, source: str) -> Iterator[str]:
    count = 0
    for row in rows:
        if text_column is not None:
            if text_column not in row:
                raise OptionError(f"calibration {source}: no column {text_column!r}; it has {', '.join(row)}")
            text = row[text_column]
        elif isinstance(row.get("text"), str):
            text = row["text"]
        else:
            # A table of prompts and responses: all its text, in the order of the columns.
            text = "\n".join(value for value in row.values() if isinstance(value, str))
        if isinstance(text, str) and text.strip():
            yield text
            count += 1
            if count == limit:
                return


def load_samples(
    source: str, tokenizer: Any, *, samples: int, length: int, seed: int, text_column: str | None = None
) -> Samples:
    """Up to `samples` samples of `length` tokens. Fewer where the text ends; raises OptionError where it has none."""
    documents = read_documents(source, text_column=text_column, limit=max(1000, _POOL * samples))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(documents))
    ids: list[int] = []
    for i in order:
        ids.extend(tokenizer(documents[i], verbose=False)["input_ids"])
        if len(ids) >= samples * length:
            break
    if len(ids) < 2:
        raise OptionError(f"calibration {source}: holds no text")
    length = min(length, len(ids))
    count = min(samples, len(ids) // length)
    array = np.array(ids[: count * length], dtype=np.int64).reshape(count, length)
    return Samples(ids=array, source=source if not Path(source).exists() else Path(source).name, seed=seed)
