"""Strict JSON: accepted and refused texts, and the memory that a hostile header can take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peraxis_conformance.generator.large import LARGE

import peraxis_format as pxd
from peraxis_format import strict_json
from peraxis_format.strict_json import STRING, VALUES_MAX, StrictJsonError, check_text, pieces, unescaped

scalars = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def deep(value: object) -> int:
    """Return the nesting depth of arrays and objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(deep, inner), default=0)


def count(value: object) -> int:
    """Return the number of elements and members (SPEC 2.11)."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return len(inner) + sum(map(count, inner))


@given(st.lists(trees, max_size=6) | st.dictionaries(st.text(), trees, max_size=6), st.sampled_from([None, 0, 1]))
def test_the_pieces_of_an_array_or_object_are_its_elements_or_members(value: list | dict, indent: int | None) -> None:
    assume(deep(value) <= 8)
    data = json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")
    texts = [data[begin:end] for begin, end in pieces(data, 0, len(data))]
    if isinstance(value, list):
        assert [json.loads(text.decode("utf-8", "surrogatepass")) for text in texts] == value
    else:
        merged = [json.loads(f"{{{text.decode('utf-8', 'surrogatepass')}}}") for text in texts]
        assert {key: part for member in merged for key, part in member.items()} == value
        assert len(texts) == len(value)


@given(st.text())
def test_a_canonical_string_matches_the_grammar_and_is_unescaped_to_its_text(text: str) -> None:
    assume(not any("\ud800" <= c <= "\udfff" for c in text))
    written = pxd.canonical_json(text)
    match = re.fullmatch(STRING, written)
    assert match is not None
    assert unescaped(match[1]) == text.encode()


@pytest.mark.parametrize(
    "written", [r'"\/"', r'"\u0041"', r'"\u000a"', r'"\u001F"', '"\x01"', r'"\x41"', '"a', r'"\u00e9"']
)
def test_another_spelling_of_a_string_does_not_match_the_grammar(written: str) -> None:
    assert re.fullmatch(STRING, written.encode()) is None


@given(st.text(st.sampled_from('\\"/bn\n\x01xé🧪'), max_size=5000))
def test_long_texts_of_escapes_are_unescaped_block_by_block(text: str) -> None:
    written = pxd.canonical_json(text * 4)
    assert unescaped(written[1:-1]) == (text * 4).encode()


REFUSED = {
    "E113": [b"\xff", b"\xef\xbb\xbf{}", b'"\xed\xa0\x80"', b'{"a":"' + b"x" * 2**16 + b'\xe2\x82"}'],
    "E114": [b"", b"{", b'{"a":1,}', b"[1 2]", b'{"a"}', b"[1]]", b"[}", b'["a]', b"[,]", b"tru", b"[NaN]"],
    "E115": [b'{"a":1,"a":1}', b'[{"a":1,"\\u0061":1}]'],
    "E116": [b"1.0", b"[1e2]", b"9007199254740992", b"-9007199254740992", b"9" * 5000],
    "E117": [b"[" * 9 + b"]" * 9, b'{"a":' * 9, b"[" * 100_000],
}


@pytest.mark.parametrize("code", REFUSED)
def test_each_violation_has_its_code(code: str) -> None:
    for data in REFUSED[code]:
        with pytest.raises(StrictJsonError) as caught:
            pxd.parse_strict_json(data)
        assert caught.value.code == code, data[:40]


def test_the_offset_of_a_broken_byte_is_right_in_every_block() -> None:
    """Two-byte characters lie across the ends of blocks of 64 KiB."""
    for place in (0, 1, 2**15 - 1, 2**15, 2**16 - 1, 2**16 + 5):
        data = bytearray(b"x" + "\u00e9".encode() * 2**17)
        data[1 + 2 * place + 1] = 0x20
        with pytest.raises(StrictJsonError) as caught:
            check_text(bytes(data))
        assert (caught.value.code, caught.value.offset) == ("E113", 1 + 2 * place)


@given(trees)
def test_values_are_counted_as_the_specification_counts_them(value: object) -> None:
    data = json.dumps(value).encode()
    assert sum(data[match.start()] != 0x22 for match in strict_json._VALUES.finditer(data)) == count(value)


def test_the_number_of_values_is_bounded_and_commas_in_strings_are_none() -> None:
    check_text(b"[" + b"0," * (VALUES_MAX - 1) + b"0]")
    check_text(b'["' + b"[,{" * VALUES_MAX + b'"]')
    with pytest.raises(StrictJsonError, match="values") as caught:
        check_text(b"[" + b"0," * VALUES_MAX + b"0]")
    assert caught.value.code == "E117"


PEAK = """
import sys
import peraxis_format as pxd
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
pxd.open(sys.argv[1]).close()
before = peak()
try:
    pxd.open(sys.argv[2]).close()
except pxd.PxdError:
    pass
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's memory")
@pytest.mark.parametrize("name", ["tied-over-limit", "metadata-over-limit", "header-values-over-limit", "digits"])
def test_a_header_takes_at_most_eight_times_its_bytes_and_8_mib(tmp_path: Path, name: str) -> None:
    small = Path(__file__).parents[2] / "conformance" / "valid" / "everything.pxd"
    path = tmp_path / "large.pxd"
    path.write_bytes(LARGE[name]())
    done = subprocess.run([sys.executable, "-c", PEAK, small, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < 8 + 8 * path.stat().st_size / 2**20
