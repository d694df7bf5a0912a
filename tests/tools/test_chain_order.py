"""The order of updates, for many of them and for any graph of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peraxis_tools.chain import order
from peraxis_tools.chain.order import Link, _folds, chain_order
from peraxis_tools.errors import CheckFailedError


def link(name: str, base: str, result: str, previous: str | None = None) -> Link:
    return Link(path=Path(f"{name}.pxd"), content_id=name, previous=previous, base=base, result=result)


@st.composite
def graphs(draw: st.DrawFn) -> list[Link]:
    count = draw(st.integers(0, 9))
    states, names = st.sampled_from("ABC"), [f"u{i}" for i in range(count)]
    previous = st.none() if not names else st.none() | st.sampled_from([*names, "absent"])
    return [link(name, draw(states), draw(states), draw(previous)) for name in names]


def replaced_by_search(links: Sequence[Link]) -> list[Link]:
    """The folded updates, searched for each of them by its own."""
    known = {each.content_id for each in links}

    def follows(at: Link, other: Link) -> bool:
        named = other.previous in known
        return other.base == at.result and (other.previous == at.content_id if named else True)

    def is_fold(wanted: Link) -> bool:
        same = [each for each in links if (each.base, each.previous) == (wanted.base, wanted.previous)]
        seen, ahead = list(same), [each for each in same if each is not wanted]
        while ahead:
            at = ahead.pop()
            for other in links:
                if follows(at, other) and other not in seen:
                    if other.result == wanted.result:
                        return True
                    seen.append(other)
                    ahead.append(other)
        return False

    return [each for each in links if is_fold(each)]


@given(graphs())
@settings(max_examples=300, deadline=None)
def test_folds_are_those_of_a_search_from_each_update(links: list[Link]) -> None:
    assert _folds(links) == replaced_by_search(links)


@pytest.mark.parametrize("shape", ["one state", "one start", "anchors"])
def test_the_work_for_folds_grows_as_the_number_of_updates(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    noted = order._noted

    def counted(*arguments: Any) -> bool:
        calls.append(1)
        return noted(*arguments)

    monkeypatch.setattr(order, "_noted", counted)

    def work(count: int) -> int:
        links = [link(f"u{i}", "A", "A") if shape == "one state" else link(f"u{i}", "A", f"r{i}") for i in range(count)]
        if shape == "anchors":
            links += [link(f"s{i}", "A" if i == 0 else f"r{i - 1}", f"r{i}") for i in range(count)]
        calls.clear()
        _folds(links)
        return len(calls)

    assert work(400) <= 2.1 * work(200)


def test_an_error_names_a_few_of_many_updates() -> None:
    links = [link(f"u{i}", "A", "A") for i in range(500)]
    with pytest.raises(CheckFailedError, match=r"^u0\.pxd: could follow u1\.pxd and u2\.pxd and u3\.pxd and 496 more,"):
        chain_order(links)
    with pytest.raises(CheckFailedError, match=r"could follow u1\.pxd and u2\.pxd, which"):
        chain_order(links[:3])


def test_the_predecessor_of_an_update_is_none_that_follows_it() -> None:
    # All results are one state; the first update is followed by the others, by name.
    links = [link(f"u{i}", "A", "A", f"u{i - 1}" if i else "absent") for i in range(300)]
    assert chain_order(links[::-1]) == links


@pytest.mark.parametrize(
    ("paths", "remedy"),
    [(("run/1.pxd", "run/2.pxd"), "delete one of them"), (("a/1.pxd", "b/1.pxd"), "pass it once"),
     (("run/1.pxd", "run/1.pxd"), "pass it once")],
)  # fmt: skip
def test_of_two_copies_in_one_folder_one_is_to_be_deleted(paths: tuple[str, str], remedy: str) -> None:
    copies = [replace(link("u", "A", "B"), path=Path(path)) for path in paths]
    with pytest.raises(CheckFailedError, match=rf"is the same update as {copies[0].path}; {remedy}$"):
        chain_order(copies)
