"""Test the kit's encoder of exact updates with the example of SPEC 13 and the choices of the reference library."""

from __future__ import annotations

import re

import numpy as np
import pytest
from peraxis_conformance.generator import blocks, updates

from peraxis_format.dtypes import DType
from peraxis_format.ops import exact
from tests.conformance.helpers import SPEC

FORM = blocks.FORMS["BF16"]


def test_the_kit_and_the_specification_have_one_example() -> None:
    text = SPEC.read_text(encoding="utf-8").partition("<!-- exact:begin -->")[2].partition("<!-- exact:end -->")[0]
    first, second, third = (line for line in text.splitlines() if re.match(r"[0-9a-f ]+$", line) and line.strip())
    old = [int(word, 16) for word in first.split()]
    changed = [int(second[5 * i : 5 * i + 4].strip() or "0", 16) for i in range(len(old))]
    new = [b or a for a, b in zip(old, changed, strict=True)]
    held, edits, data = updates.EXAMPLE
    assert (list(held), [edits.get(i, value) for i, value in enumerate(held)]) == (old, new)
    assert blocks.keyed(old, new, FORM, 122) == data == bytes.fromhex(third)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("every", [150, 20, 3, 1])
def test_two_writers_that_share_no_code_choose_the_same_bytes(dtype: str, every: int) -> None:
    old = updates.spread(f"two {every}", dtype, 700)
    new = updates.changed(f"two {every}", dtype, old, every, 5)
    kind = DType(dtype)
    before, after = (np.array(words, f"<u{kind.itemsize}").view(kind.storage) for words in (old, new))
    for prefer, coder in (("size", blocks.best), ("speed", blocks.fastest)):
        key, made = coder(old, new, blocks.FORMS[dtype])
        index, data = exact.encode(before, after, kind, prefer="size" if prefer == "size" else "speed")
        assert (index.tolist(), data.tobytes()) == ([len(made) << 8 | key], made)


def test_the_cost_of_a_block_is_least_for_the_key_that_is_chosen() -> None:
    old = updates.spread("least", "BF16", 400)
    new = updates.changed("least", "BF16", old, 4, 6)
    chosen = len(blocks.keyed(old, new, FORM, blocks.key(old, new, FORM)))
    shortest = min(len(blocks.keyed(old, new, FORM, a)) for a in range(105, 136))
    assert chosen <= shortest + 3  # the cost is an estimate: an escape and the last run are not counted exactly
