"""Turn the rows of a text source into documents: plain text, or a conversation whose turns have roles.

The column of a row is chosen in this order:

    the column that the user names
    `text`, if it is a string
    a list of turns under any name (messages, conversations, ...): {role, content} or {from, value}
    a prompt and its answer (prompt, response; instruction, input, output; question, answer): also a conversation
    all columns of strings, in order, except those that only label a row (id, source, ...)

A row without any of these is skipped, and a note says how many are. A source without a document is an error, which
lists the columns and their types.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

from peraxis_format.arguments import did_you_mean
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import counted
from peraxis_tools.errors import OptionError, first_line
from peraxis_tools.process.quiet import quiet_datasets
from peraxis_tools.remote.names import names_a_file
from peraxis_tools.texts.text_faults import LineError, fault_of, json_rows, open_text, text_suffix

__all__ = ["Conversation", "Document", "check_text", "read_documents"]

_LOADERS: Final = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".csv": "csv",
}
_CHUNK: Final = 1000  # rows
_HALVES: Final = re.compile("[\ud800-\udfff]")
_COLUMNS: Final = 1000
_ROLES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ASKED: Final = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_LABELS: Final = frozenset(
    "id uuid index idx source url timestamp date category split lang language dataset model task name title".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns in order: (role, text), with the roles of chat templates (system, user, assistant, ...)."""

    turns: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The turns without their roles, one in each line, for a tokenizer without a chat template."""
        return "\n".join(text for _, text in self.turns)


Document: TypeAlias = str | Conversation


def check_text(source: str) -> None:
    """Raise OptionError for a file that does not exist or is of another kind, before any work. Reads nothing."""
    path = Path(source)
    if source == "c4":
        return
    if not path.exists():
        name = source.partition(":")[0]
        if names_a_file(name) or "/" not in name:  # a mistyped file is not looked up on a network
            raise OptionError(f"text {source}: no such file, and not a datasets id (org/name or org/name:config)")
    elif text_suffix(path) not in _LOADERS or path.name.endswith(".parquet.gz"):
        raise OptionError(f"text {source}: not one of {', '.join(_LOADERS)} (or .gz of them, but not of parquet)")


def read_documents(source: str, *, text_column: str | None, limit: int) -> list[Document]:
    """The first `limit` documents of `c4`, a file (json, jsonl, parquet, txt, csv; also .gz), or a datasets id.

    Raises OptionError if the source cannot be read, or has no document.
    """
    try:
        found: list[Document] = []
        columns: dict[str, dict[str, None]] = {}
        without = broken = 0
        for row in _rows(source):
            for name, value in row.items():
                if value is not None:
                    columns.setdefault(name, {})[_kind(value)] = None
            document = _document(row, text_column=text_column, source=source)
            if document is None:
                without += 1
                continue
            if not _is_unicode(document):
                broken += 1
                continue
            found.append(document)
            if len(found) == limit:
                break
    except OptionError:
        raise
    except LineError as error:
        raise OptionError(f"text {source}: {error}") from None
    except Exception as error:
        # `datasets` raises many types, its own and those of file systems; all mean that the source cannot be read.
        fault = fault_of(Path(source)) if Path(source).exists() else None
        raise OptionError(f"text {source}: {fault or f'cannot be read: {_reason(error)}'}") from error
    if broken:
        note(f"text {source}: half of a surrogate pair (like \\ud800) in {counted(broken, 'row')}, left out")
    if not found:
        if not columns:
            raise OptionError(f"text {source}: is empty; name another text")
        if all(list(kinds) == ["text"] for kinds in columns.values()):
            why = "has half of a surrogate pair, or is blank" if broken else "is blank"
            raise OptionError(f"text {source}: every row {why}; name another text")
        held = ", ".join(f"{name} ({' or '.join(kinds)})" for name, kinds in columns.items())
        raise OptionError(
            f"text {source}: holds no text; its columns: {held}; name one with text_column (--text-column)"
        )
    if without and text_suffix(Path(source)) != ".txt":  # which has no rows, but paragraphs
        rows = f"{'the first ' if len(found) == limit else ''}{counted(len(found) + without, 'row')}"
        note(f"text {source}: no text in {without} of {rows}, left out")
    return found


def _reason(error: Exception) -> str:
    """One line of an error of `datasets`. Without a connection it names only the class of the cause, in brackets."""
    line = first_line(error)
    if (unreached := re.fullmatch(r"(Couldn't reach .*) \((\w+)\)", line)) is not None:
        why = "HF_HUB_OFFLINE is set" if unreached[2] == "OfflineModeIsEnabled" else "it does not answer"
        return f"{unreached[1]}: {why}, and the cache has no copy"
    if (table := re.fullmatch(r"Error tokenizing data\. C error: (.*)", line)) is not None:
        return table[1]
    return f"{type(error).__name__}: {line}"


def _rows(source: str) -> Iterable[dict[str, Any]]:
    check_text(source)
    path = Path(source)
    if text_suffix(path) == ".jsonl" and path.is_file():
        return _json_lines(path)
    return _of_datasets(source, path)


def _of_datasets(source: str, path: Path) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    with quiet_datasets(), ExitStack() as kept_open:
        if source == "c4":
            rows = load_dataset("allenai/c4", "en", split="train", streaming=True)
        elif path.exists():
            kind = _LOADERS[text_suffix(path)]
            extra = {"sample_by": "paragraph"} if kind == "text" else {}
            plain = kept_open.enter_context(_plain_name(path))
            rows = load_dataset(kind, data_files=str(plain), split="train", streaming=True, **extra)
        else:
            name, _, config = source.partition(":")
            rows = load_dataset(name, config or None, split="train", streaming=True)
        yield from rows


@contextmanager
def _plain_name(path: Path) -> Iterator[Path]:
    """The file, under a name that `datasets` takes for no pattern and no chain of file systems."""
    whole = path.resolve()
    if not set(str(whole)) & set("*?[]{}!") and "::" not in str(whole):
        yield whole
        return
    with TemporaryDirectory(prefix="peraxis-") as folder:
        link = Path(folder) / f"text{text_suffix(path)}{'.gz' if path.name.endswith('.gz') else ''}"
        link.symlink_to(whole)
        yield link


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a local file, each with every column so far. It is read here, because `datasets` takes 90 MB."""
    columns: dict[str, None] = {}
    with open_text(path) as file:
        rows = json_rows(file)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            for row in chunk:
                columns.update(dict.fromkeys(row))
                if len(columns) > _COLUMNS:  # every row gets every column
                    raise LineError(f"its rows have more than {_COLUMNS} columns")
            yield from ({column: row.get(column) for column in columns} for row in chunk)


def _document(row: Mapping[str, Any], *, text_column: str | None, source: str) -> Document | None:
    if text_column is not None:
        if text_column not in row:
            hint = did_you_mean(text_column, row)
            raise OptionError(f"text {source}: no column {text_column!r}; it has {', '.join(row)}{hint}")
        value = row[text_column]
        if not (value is None or isinstance(value, str) or _turns(value)):
            raise OptionError(f"text {source}: column {text_column!r} holds a {_kind(value)}, not text or turns")
        return _one(value)
    if isinstance(row.get("text"), str):
        return _one(row["text"])
    for value in row.values():
        if (turns := _turns(value)) is not None:
            return Conversation(turns=turns)
    return _asked(row) or _one("\n".join(_strings(row)))


def _is_unicode(document: Document) -> bool:
    """Whether it is text that can be encoded: JSON can hold the half of a surrogate pair."""
    texts = [document] if isinstance(document, str) else [text for turn in document.turns for text in turn]
    return not any(_HALVES.search(text) for text in texts)


def _one(value: Any) -> Document | None:
    if isinstance(value, str):
        return value if value.strip() else None
    turns = _turns(value)
    return None if turns is None else Conversation(turns=turns)


def _strings(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, str) and name.lower() not in _LABELS:
            yield value


def _asked(row: Mapping[str, Any]) -> Conversation | None:
    """A prompt and its answer. An `input` beside an instruction is part of the prompt."""
    for prompt, answer in _ASKED:
        question, said = row.get(prompt), row.get(answer)
        if isinstance(question, str) and isinstance(said, str) and (question + said).strip():
            more = row.get("input") if prompt == "instruction" else None
            asked = f"{question}\n{more}" if isinstance(more, str) and more.strip() else question
            return Conversation(turns=(("user", asked), ("assistant", said)))
    return None


def _turns(value: Any) -> tuple[tuple[str, str], ...] | None:
    """The turns of a list of {role, content} or {from, value}; None if it is empty or another value."""
    if not isinstance(value, list):
        return None
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        role = turn.get("role", turn.get("from"))
        text = _text(turn.get("content", turn.get("value")))
        if not isinstance(role, str) or text is None:
            return None
        turns.append((_ROLES.get(role, role), text))
    return tuple(turns) if any(text.strip() for _, text in turns) else None


def _text(content: Any) -> str | None:
    """A turn's content: a string, or the text parts of a list of parts."""
    if isinstance(content, list):
        return "".join(
            part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        )
    return "" if content is None else content if isinstance(content, str) else None


def _kind(value: Any) -> str:
    if _turns(value) is not None:
        return "list of turns"
    return {str: "text", list: "list", dict: "mapping", int: "number", float: "number"}.get(
        type(value), type(value).__name__
    )
