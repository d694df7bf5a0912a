"""The bases of several files: that each was made for the checkpoint, or for the state after others of the files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_format.errors import located
from peraxis_tools.chain.opened import opened_all
from peraxis_tools.chain.order import Link
from peraxis_tools.chain.predecessors import Predecessors
from peraxis_tools.chain.rolling import Node, below, check_states
from peraxis_tools.chain.state import ChainState, StateNames
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.deltas.predecessor import advise, predecessor_named
from peraxis_tools.deltas.unpacked import check_results
from peraxis_tools.display.progress import ProgressOf, silent
from peraxis_tools.process.parallel import ordered_map

__all__ = ["BaseChecks", "FoundBase"]

_AHEAD_BYTES: Final = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBase:
    """The base that a file was made for. before: the update with this result; None: the checkpoint.

    results: the number of exact modules, whose results were checked.
    """

    before: Path | None
    results: int


class BaseChecks:
    """Step 12 of SPEC 8 for several files. The checkpoint is hashed once, and each update of a chain decoded once.

    files: the names of all files. open_base: opens the checkpoint, when it is needed first; `close` closes it.
    """

    def __init__(
        self, files: Iterable[str | Path], open_base: Callable[[], Checkpoint], *, workers: int | None
    ) -> None:
        self._known = Predecessors(files)
        self._open_base = open_base
        self._workers = workers
        self._opened: Checkpoint | None = None
        self._digests: dict[str, str] = {}
        self._nodes: dict[str, tuple[Link | None, Exception | None]] | None = None

    @property
    def base(self) -> Checkpoint:
        """The checkpoint. Raises the errors of `open_base`."""
        self._opened = self._opened or self._open_base()
        return self._opened

    def check(self, delta: pxd.DeltaFile, progress: ProgressOf) -> FoundBase:
        """Check the base of a file, and the results of its exact modules.

        Raises BindingError, PxdError for a damaged update before it, and the errors of `open_base`.
        """
        base = self.base
        if delta.content_id in self._known.links:
            return self._of_chain(delta, base.tensors, progress)
        before = self._known.of(delta.manifest)
        with opened_all(before) as updates, predecessor_named(*updates, delta):
            try:
                self._check_base(delta.manifest, base.tensors, progress)
                return FoundBase(before=None, results=check_results(delta, base.tensors))
            except pxd.BindingError:
                if not before:
                    raise
            state = ChainState(base.tensors, updates)
            with located(delta.path):
                pxd.check_base(delta.manifest, state, workers=self._workers)
                return FoundBase(before=before[-1], results=check_results(delta, state))

    def close(self) -> None:
        """Close the checkpoint."""
        if self._opened is not None:
            self._opened.close()

    def _check_base(self, manifest: pxd.Manifest, base: pxd.Safetensors, progress: ProgressOf) -> None:
        """Check names and digests of the checkpoint, each tensor of which is hashed once for all files."""
        pxd.check_base_names(manifest, base)
        bound = [module for module in manifest.modules if module.base is not None]
        missing = [module.name for module in bound if module.name not in self._digests]
        if missing:
            with progress("base", sum(base[name].size for name in missing)) as step:
                self._hash(missing, base, step)
        for module in bound:
            pxd.check_base_digest(module, self._digests[module.name])

    def _hash(self, names: Sequence[str], base: pxd.Safetensors, step: Callable[[int], None]) -> None:
        digests = ordered_map(
            lambda name: (name, base.sha256(name, progress=step)),
            names,
            cost=lambda name: base[name].size,
            budget=_AHEAD_BYTES,
            workers=self._workers,
        )
        with contextlib.closing(digests):
            self._digests.update(digests)

    def _of_chain(self, delta: pxd.DeltaFile, base: pxd.Safetensors, progress: ProgressOf) -> FoundBase:
        if self._nodes is None:
            with opened_all([link.path for link in self._known.links.values()]) as files:
                self._nodes = self._checked(files, base, progress)
        before, error = self._nodes[delta.content_id]
        if error is not None:
            raise error  # its own, or that of an update before it
        exact = sum(module.encoding is pxd.Encoding.EXACT for module in delta.manifest.modules)
        return FoundBase(before=None if before is None else before.path, results=exact)

    def _checked(
        self, files: list[pxd.DeltaFile], base: pxd.Safetensors, progress: ProgressOf
    ) -> dict[str, tuple[Link | None, Exception | None]]:
        """For each update the one before it (None: it was made for the checkpoint), and its error."""
        nodes = {file.content_id: Node(file=file) for file in files}
        before: dict[str, Link | None] = {}
        roots: list[Node] = []
        for content_id, node in nodes.items():
            try:
                self._check_base(node.file.manifest, base, progress)
                link = None
            except pxd.BindingError as error:
                error.file = str(node.file.path)
                link, node.error = self._known.before(node.file.manifest), error
            before[content_id] = link
            if link is None:
                roots.append(node)
            else:
                nodes[link.content_id].children.append(node)
        for node in below(roots):
            for child in node.children:
                child.error = _other_names(node, child)  # nodes of a ring keep the error of the checkpoint
        size = sum(base[name].size for name in base)
        with progress("chain", size) if len(roots) < len(nodes) else silent("chain", size) as step:
            check_states(roots, base, self._digests, workers=self._workers, step=step)
        for content_id, node in nodes.items():
            if isinstance(node.error, pxd.PxdError) and node.error.file == str(node.file.path):
                link = before[content_id]
                advise(node.error, node.file, given=None if link is None else link.path)
        return {content_id: (before[content_id], node.error) for content_id, node in nodes.items()}


def _other_names(node: Node, child: Node) -> pxd.BindingError | None:
    """The error if an update was made for other tensors than those after the one before it (SPEC 7.1, 7.2)."""
    try:
        pxd.check_base_names(child.file.manifest, StateNames(node.file))
    except pxd.BindingError as error:
        error.file = str(child.file.path)
        return error
    return None
