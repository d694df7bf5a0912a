"""Check updates on the states before them in one pass: each file is decoded once, with few tensors in memory.

The state goes from the base through all updates, tensor by tensor. Tensors that one of the files ties go together,
because one update may store under either name what another one stores under both.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import peraxis_format as pxd
from peraxis_format.errors import located
from peraxis_tools.errors import ToolError
from peraxis_tools.process.parallel import ordered_map

__all__ = ["Node", "below", "check_states"]

_AHEAD_BYTES: Final = 512 << 20
_BYTES_IN_FLIGHT_PER_TENSOR: Final = 3  # times its own bytes: the old one, its update, and the new one


class _TensorState:
    """A tensor of a state: its digest, and its weights, which are read when an update needs them."""

    def __init__(self, digest: str, read: Callable[[], pxd.Array]) -> None:
        self.digest = digest
        self._read = read
        self._array: pxd.Array | None = None

    @property
    def array(self) -> pxd.Array:
        if self._array is None:
            self._array = self._read()
        return self._array


_State = dict[str, _TensorState]


@dataclass(slots=True, eq=False, kw_only=True)
class Node:
    """An update, and those that follow it. error: the reason why it cannot be checked, or fails."""

    file: pxd.DeltaFile
    children: list[Node] = field(default_factory=list)
    error: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """An error of a node. place: the module's index in the file."""

    node: Node
    place: int
    error: Exception


def check_states(
    roots: Sequence[Node],
    base: pxd.Safetensors,
    digests: Mapping[str, str],
    *,
    workers: int | None,
    step: Callable[[int], None],
) -> None:
    """Set `error` of the nodes whose base is not the state before them, or whose results are others (SPEC 7.3, 7.4).

    roots: updates that were made on `base`, whose names and digests are checked, or that need none. A node after a
    failed one has its error. step: called with the bytes of the tensors that are done.
    """
    nodes = list(below(roots))
    sizes = {entry.name: entry.dtype.size_of(entry.shape) for node in nodes for entry in node.file.manifest.modules}
    places = {id(node): {e.name: i for i, e in enumerate(node.file.manifest.modules)} for node in nodes}

    def work(names: tuple[str, ...]) -> list[_Failure]:
        failures = list(_walk(roots, names, base, digests, places))
        step(sum(sizes.get(name, 0) for name in names))
        return failures

    first: dict[Node, _Failure] = {}
    groups = _tied_together(nodes)
    results = ordered_map(
        work,
        groups,
        cost=lambda names: _BYTES_IN_FLIGHT_PER_TENSOR * sum(sizes.get(name, 0) for name in names),
        budget=_AHEAD_BYTES,
        workers=workers,
    )
    with contextlib.closing(results) as found:
        for failure in (failure for failures in found for failure in failures):
            if failure.node not in first or failure.place < first[failure.node].place:
                first[failure.node] = failure
    for node in nodes:  # parents come before their children
        node.error = node.error or (first[node].error if node in first else None)
        for child in node.children:
            child.error = child.error or node.error


def below(roots: Sequence[Node]) -> Iterator[Node]:
    """All nodes, each before those that follow it."""
    ahead = list(roots)
    while ahead:
        node = ahead.pop()
        yield node
        ahead += node.children


def _walk(
    roots: Sequence[Node],
    names: tuple[str, ...],
    base: pxd.Safetensors,
    digests: Mapping[str, str],
    places: Mapping[int, Mapping[str, int]],
) -> Iterator[_Failure]:
    """Yield the failures of these tensors. The state of a node is dropped when those that follow it are done."""
    begin = {name: _TensorState(digests[name], partial(base.read, name)) for name in names if name in digests}
    ahead: list[tuple[Node, _State]] = [(root, begin) for root in reversed(roots)]
    while ahead:
        node, before = ahead.pop()
        if node.error is not None:
            continue
        state: _State = {}
        for name in names:
            place = places[id(node)].get(name)
            if place is None:
                continue
            try:
                after = _after(node, name, before)
            except (pxd.PxdError, pxd.CheckpointError, ToolError, OSError) as error:
                yield _Failure(node=node, place=place, error=error)
                break
            if after is not None:
                state[name] = after
        else:
            state |= {alias: state[name] for name, alias in node.file.manifest.tied if name in state}
            ahead += [(child, state) for child in node.children]


def _after(node: Node, name: str, state: _State) -> _TensorState | None:
    """Check a tensor's base and its result. Returns the new one, if an update may need it. Raises E404, E405."""
    entry = node.file.entry(name)
    before = None if entry.base is None else state[name]
    with located(node.file.path):
        if before is not None:
            pxd.check_base_digest(entry, before.digest)
        same = entry.encoding is pxd.Encoding.SAME and entry.base is not None and entry.base.shape == entry.shape
        if same or not (node.children or entry.encoding is pxd.Encoding.EXACT):
            return before
        changes = before is not None and entry.encoding is not pxd.Encoding.FULL
        array = pxd.reconstruct(node.file.load(name), before.array if before is not None and changes else None)
        digest = (entry.result or pxd.digest_of(array)) if node.children else ""
        return _TensorState(digest, lambda: array)


def _tied_together(nodes: Sequence[Node]) -> list[tuple[str, ...]]:
    """The names of all tensors, in groups that no tie crosses."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for node in nodes:
        for entry in node.file.manifest.modules:
            find(entry.name)
        for name, alias in node.file.manifest.tied:
            leader[find(alias)] = find(name)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in leader:
        groups[find(name)].append(name)
    return [tuple(group) for group in groups.values()]
