"""What a broken file of text is answered with: what is wrong, where in the file, and what to do."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from peraxis_tools.errors import OptionError
from peraxis_tools.texts.documents import read_documents

ROWS = '{"text": "sun"}\n\n{"text": "moon"}\n'
LATIN = "café moon".encode("latin-1")


def noise(rows: int = 4000) -> bytes:
    draw = random.Random(0)
    return "".join(f'{{"text": "{draw.random()}"}}\n' for _ in range(rows)).encode()


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(OptionError) as found:
        read_documents(str(path), text_column=None, limit=100_000)
    said = str(found.value)
    assert said.startswith(f"text {path}: ")
    assert "Error" not in said.replace(str(path), "")  # no exception of Python
    assert "\n" not in said
    return said.removeprefix(f"text {path}: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "A.JSONL"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": sun}', "line 4 is not JSON: Expecting value at column 10; mend it"),
        ('{"text": "sun"', "line 4 is not JSON: Expecting ',' delimiter at column 15; mend it"),
        ("[1]", "line 4 is a list, not an object"),
        ("[" * 100_000, "line 4 is nested too deeply"),
    ],
)
def test_a_broken_line_is_named_by_its_number_in_the_file(name: str, line: str, said: str, tmp_path: Path) -> None:
    data = f"{ROWS}{line}\n{ROWS}".encode()
    assert refused(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data).startswith(said)


def test_a_broken_line_of_one_value_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    said = refused(tmp_path / "a.json", b'[{"text": "sun"},\n{"text": moon}]')
    assert said == "line 2 is not JSON: Expecting value at column 10; mend it"


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("a.txt", "sun\n\n"),
        ("a.csv", "text\nsun\n"),
        ("a.jsonl", '{"text": "sun"}\n{"text": "moon"}\n'),
        ("a.json", '{"text": "sun"}\n{"text": "moon"}\n'),
    ],
)
def test_a_text_that_is_not_utf8_is_named_with_the_line_and_the_byte(name: str, before: str, tmp_path: Path) -> None:
    data = before.encode() + LATIN
    assert refused(tmp_path / name, data) == f"line 3 is not UTF-8 at byte {len(before) + 3} (0xe9); save it as UTF-8"
    said = refused(tmp_path / f"{name}.gz", gzip.compress(data))
    assert said.startswith(f"line 3 is not UTF-8 at byte {len(before) + 3} of the text in it (0xe9)")
    assert refused(tmp_path / name, (before * 3).encode("utf-16")) == "is UTF-16; save it as UTF-8"


def test_the_byte_is_that_of_the_file_beyond_the_part_that_a_reader_holds(tmp_path: Path) -> None:
    before = ("sun moon " * 2_000 + "\n\n") * 1_000
    assert f"line 2001 is not UTF-8 at byte {len(before) + 3} " in refused(tmp_path / "a.txt", before.encode() + LATIN)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz", "a.csv.gz"])
def test_a_file_that_is_cut_off_or_damaged_is_to_be_fetched_again(name: str, tmp_path: Path) -> None:
    data = gzip.compress(noise())
    said = refused(tmp_path / name, data[:-2000])
    assert said.startswith("is cut off: its compressed data ends after ")
    assert said.endswith(" bytes of text; fetch the file again")
    said = refused(tmp_path / name, data[:20_000] + b"\xff" * 50 + data[20_050:])
    assert said.startswith("is damaged: its compressed data is wrong after ")
    assert refused(tmp_path / name, noise(3)).startswith("is not compressed, although its name ends in .gz; rename it")


def test_a_table_that_is_cut_off_is_to_be_fetched_again(tmp_path: Path) -> None:
    said = refused(tmp_path / "a.parquet", b"PAR1" + bytes(100))
    assert said == "is cut off, as a parquet file ends with PAR1; fetch the file again"
    assert refused(tmp_path / "a.parquet", b"text" * 9).startswith("is not a parquet file, as it does not begin with")
    assert refused(tmp_path / "a.csv", b'text\nsun\n"moon\n') == "cannot be read: EOF inside string starting at row 2"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl"])
def test_a_file_of_any_kind_without_text_is_called_empty(name: str, tmp_path: Path) -> None:
    for data in (b"", b"\n\n"):
        assert refused(tmp_path / name, data) == "is empty; name another text"
        assert refused(tmp_path / f"{name}.gz", gzip.compress(data)) == "is empty; name another text"


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ROWS.encode())
    assert read_documents(str(tmp_path / "a.jsonl"), text_column=None, limit=9) == ["sun", "moon"]


def test_a_compressed_file_is_read_as_the_file_in_it(tmp_path: Path) -> None:
    rows = '{"text": "sun", "at": 3}\n{"text": "2020-01-01 00:00:00"}\n{"other": "moon"}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    plain, packed = (
        read_documents(str(tmp_path / name), text_column=None, limit=9) for name in ("a.jsonl", "a.jsonl.gz")
    )
    assert plain == packed == ["sun", "2020-01-01 00:00:00", "moon"]
