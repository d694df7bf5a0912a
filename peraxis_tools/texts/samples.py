"""Turn text into tokens: fixed-length samples without padding, equal for equal text, tokenizer and seed.

Documents (documents.py) are shuffled by the seed, tokenised, ended with the model's end-of-text token as in training,
concatenated, and cut into samples of `sequence_length`. A conversation is formatted with the tokenizer's chat template,
so that its roles and markers are included.

A fit has no information about tokens that are not in the text, and the end of a document or a role's marker may then
cost more than all other tokens together. `unread_tokens` lists such tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import counted
from peraxis_tools.errors import OptionError
from peraxis_tools.remote.names import names_a_file
from peraxis_tools.texts.chat_template import Render, chat_template_of
from peraxis_tools.texts.documents import Conversation, Document, check_text, read_documents
from peraxis_tools.texts.encoding import token_ids

__all__ = [
    "Ids",
    "Samples",
    "Source",
    "check_calibration",
    "check_texts",
    "load_samples",
    "unread_tokens",
    "without_folders",
]

_POOL: Final = 20  # documents to read for each sample, and at least 1000; the seed shuffles them
_ENDS_WITHIN: Final = 3  # last tokens that may include the end-of-text token: templates add a line break after it
_CHARACTERS: Final = 16  # of a long document that are read for each token that is used, four times those of most texts
_SPARE: Final = 64  # tokens beyond those that are used
_DECIMAL: Final = re.compile(r"\d+\.?\d*|\.\d+", re.ASCII)
_WEIGHT_MOST: Final = 1e6

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One text, and its weight relative to the other texts."""

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse `NAME` or `NAME:WEIGHT`, like `c4:0.5`. Raises OptionError for a weight that is out of its bounds.

        A number is the weight of any name if it is a decimal, else only of a file and of c4: `org/name:1e3` is the
        configuration 1e3 of a data set. The whole is a name if it is that of a file.
        """
        name, _, number = text.rpartition(":")
        weight = _number(number)
        if not name or weight is None or os.path.exists(text):
            return cls(name=text)
        is_weight = _DECIMAL.fullmatch(number) or name == "c4" or os.path.exists(name) or names_a_file(name)
        if not is_weight:
            return cls(name=text)
        if not 0.0 < weight <= _WEIGHT_MOST:
            raise OptionError(f"text {text}: a weight must be above 0, up to {_WEIGHT_MOST:.0f}, like {name}:0.5")
        return cls(name=name, weight=weight)

    @property
    def label(self) -> str:
        """The name for a manifest: a file's without its folders, another's as it is."""
        is_file = Path(self.name).exists() or names_a_file(self.name.partition(":")[0])
        return Path(self.name).name if is_file else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Token ids int64 [samples, length], their source, and their digest by SPEC 3.4.

    counts: the number of samples of each source, in order.
    """

    ids: Ids
    source: str
    seed: int
    counts: tuple[int, ...]

    @property
    def digest(self) -> str:
        """The digest of the ids as 32-bit little-endian integers, sample after sample."""
        return "sha256:" + hashlib.sha256(self.ids.astype("<u4").tobytes()).hexdigest()

    @property
    def by_source(self) -> list[Ids]:
        """The ids of each source: [its samples, length]."""
        return np.split(self.ids, np.cumsum(self.counts)[:-1].tolist())


def without_folders(texts: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """Texts (`NAME` or `NAME:WEIGHT`) for a manifest, which must not show a folder of this machine or depend on it."""
    if texts is None or not isinstance(texts, str):
        return texts and tuple(str(without_folders(text)) for text in texts)
    source = Source.parse(texts)
    return source.label + texts.removeprefix(source.name)


def check_texts(texts: Iterable[str | Path]) -> list[str]:
    """The names of these texts, without weights. Raises OptionError for a file that cannot be read; reads nothing."""
    names = [Source.parse(str(text)).name for text in texts]
    for name in names:
        check_text(name)
    return names


def check_calibration(calibration: str | tuple[str, ...] | None) -> list[str]:
    """The names of calibration texts, as `check_texts`. Raises OptionError also for a text that is given twice: texts
    validate each other, and a text tells nothing about itself.
    """
    names = check_texts((calibration,) if isinstance(calibration, str) else calibration or ())
    met: dict[str, str] = {}
    for name in names:
        there = os.path.realpath(name) if os.path.exists(name) else name
        if there in met:
            same = "is given twice" if met[there] == name else f"is the same file as {met[there]}"
            raise OptionError(f"text {name}: {same}; name it once, with a weight for more of it ({name}:2)")
        met[there] = name
    return names


def load_samples(
    sources: str | Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    text_column: str | None = None,
    asked: bool = False,
) -> Samples:
    """Load up to `samples` samples of `length` tokens, distributed over the sources by weight.

    There are fewer if a text is too short; a note says so, if the number was asked for. Raises OptionError if a text
    has no sample.
    """
    parsed = [Source.parse(name) for name in ([sources] if isinstance(sources, str) else sources)]
    found = []
    with chat_template_of(tokenizer) as render:
        for source, count in zip(parsed, _shares([source.weight for source in parsed], samples), strict=True):
            limit = max(1000, _POOL * count)
            documents = read_documents(source.name, text_column=text_column, limit=limit)
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(documents))
            ids: list[int] = []
            for document in (documents[i] for i in order):
                ids.extend(_tokens(document, tokenizer, render, most=count * length - len(ids)))
                if len(ids) >= count * length:
                    break
            if len(ids) < 2:
                raise OptionError(f"text {source.name}: holds no text")
            found.append(ids[: count * length])
            if asked and length <= len(ids) < count * length:
                first = f"its first {limit} documents hold" if len(documents) == limit else "holds"
                note(f"text {source.name}: {first} {len(ids) // length} of the {counted(count, 'sample')} asked for")
    for source, read in zip(parsed, found, strict=True):
        if len(read) < length:
            note(
                f"text {source.name}: has {counted(len(read), 'token')}, less than one sample of {length}; this is too "
                "little text for a meaningful result"
            )
    length = min(length, *map(len, found))
    arrays = [np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length) for ids in found]
    return Samples(
        ids=np.concatenate(arrays),
        source="; ".join(source.label for source in parsed),
        seed=seed,
        counts=tuple(map(len, arrays)),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shares(weights: Sequence[float], count: int) -> list[int]:
    """Integers in proportion to the weights, at least 1 each, by the method of largest remainders."""
    exact = [weight / sum(weights) * count for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])[: max(0, count - sum(shares))]:
        shares[i] += 1
    return shares


def _tokens(document: Document, tokenizer: Any, render: Render | None, *, most: int) -> Iterator[int]:
    """A document's tokens, with the end-of-text token added if the tokenizer has one and the text lacks it.

    render: formats a conversation by the chat template. A conversation that it refuses is read as plain text. most: the
    tokens that are used; of a long document more may be left out.
    """
    written = None
    if render is not None and isinstance(document, Conversation):
        written = render([{"role": role, "content": text} for role, text in document.turns])
    if written is not None:
        ids = _first_ids(tokenizer, written, most=most, special=False)
    else:
        text = document.text if isinstance(document, Conversation) else document
        ids = _first_ids(tokenizer, text, most=most, special=True)
    yield from ids
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and end not in ids[-_ENDS_WITHIN:]:
        yield end


def _first_ids(tokenizer: Any, text: str, *, most: int, special: bool) -> list[int]:
    """The ids of a text; of a long one the first `most` and some more.

    A tokenizer takes 200 bytes for each character of a text.
    """
    head = text[: _CHARACTERS * (most + _SPARE)]
    if len(head) < len(text):
        ids = token_ids(tokenizer, head, special=special)
        if len(ids) >= most + _SPARE:  # those near the cut may differ from those of the whole text
            return ids
    return token_ids(tokenizer, text, special=special)


def unread_tokens(tokenizer: Any, ids: Ids) -> list[str]:
    """The special tokens that the model may read but that are in no sample.

    These are the tokenizer's own special tokens and those of its chat template, without padding.
    """
    special = {int(number) for number in getattr(tokenizer, "all_special_ids", ())}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    written = {int(number) for number, token in added.items() if str(token) and str(token) in template}
    met = written | {number for number in (tokenizer.bos_token_id, tokenizer.eos_token_id) if number is not None}
    never_fed = {tokenizer.pad_token_id, tokenizer.unk_token_id} - met
    unread = ((special - never_fed) | met) - set(np.unique(ids).tolist())
    ordered = sorted(unread, key=lambda number: (number not in met, number))
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in ordered]
