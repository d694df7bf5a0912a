"""One batch in one block: the inputs of each stage, and the output of the block.

    CachedPass      runs once before all fits and caches the inputs of every stage: for the teacher
    SuspendedPass   runs once, in a thread that stops before a stage's products until the stage is fitted, and then
                    computes them with the fitted parameters: for the student
    ReplayedPass    runs anew for every stage and once more for the output. It needs no memory and follows any
                    control flow

All three give the same tensors, bit for bit. Threads of suspended passes never run at the same time: a thread only
stores an unfinished forward pass with its live activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

from peraxis_tools.compress.fit.moments.recorder import Call, StopForward
from peraxis_tools.compress.fit.moments.stages import Key, Stage, key_of

__all__ = ["BlockPass", "CachedPass", "ReplayedPass", "Run", "SuspendedPass"]

# Runs the block on one batch and returns its output; each product on a watched parameter is reported first.
Run = Callable[[Callable[[Call], None]], Tensor]


class BlockPass(Protocol):
    """A batch in a block. Ask for the stages in order, each at most once."""

    def inputs(self, stage: Stage) -> dict[Key, Tensor]:
        """The inputs of the stage's observed keys, [n, d_in] each, including those of all experts."""

    def finish(self) -> Tensor:
        """The block's output."""

    def close(self) -> None:
        """Free the memory of this pass."""


class CachedPass:
    """A finished pass with cached inputs of the given stages."""

    def __init__(self, calls: Sequence[Call], output: Tensor, stages: Collection[Stage]) -> None:
        """calls: all calls that the pass reported, in order."""
        wanted = {key for stage in stages for key in stage.observed}
        self._inputs: dict[Key, Tensor] = {}
        self._output: Tensor | None = output
        for call in calls:
            key = key_of(call)
            if key in wanted:
                self._inputs.setdefault(key, call.inputs)

    @classmethod
    def of(cls, run: Run, stages: Collection[Stage]) -> CachedPass:
        """Run the pass now."""
        wanted = {key for stage in stages for key in stage.observed}
        calls: list[Call] = []

        def see(call: Call) -> None:
            if key_of(call) in wanted:
                calls.append(call)

        return cls(calls, run(see), stages)

    @property
    def nbytes(self) -> int:
        """The bytes of the cached inputs."""
        return sum(value.numel() * value.element_size() for value in self._inputs.values())

    def inputs(self, stage: Stage) -> dict[Key, Tensor]:
        return {key: self._inputs.pop(key) for key in stage.observed if key in self._inputs}

    def finish(self) -> Tensor:
        return _reached(self._output)

    def close(self) -> None:
        self._inputs.clear()
        self._output = None


class ReplayedPass:
    """A pass that is run again for each stage and for the output."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def inputs(self, stage: Stage) -> dict[Key, Tensor]:
        found: dict[Key, list[Tensor]] = {}

        def see(call: Call) -> None:
            key = key_of(call)
            if stage.experts:
                if call.parameter in stage.parameters and stage.input_of.get(key, key) == key:
                    found.setdefault(key, []).append(call.inputs.clone())
            elif key in stage.observed and key not in found:
                found[key] = [call.inputs.clone()]
                if len(found) == len(stage.observed):
                    raise StopForward

        with suppress(StopForward):
            self._run(see)
        return {key: torch.cat(inputs) for key, inputs in found.items()}

    def finish(self) -> Tensor:
        return self._run(_ignore)

    def close(self) -> None:
        pass


class SuspendedPass:
    """A pass in a thread, which stops at each requested stage."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._orders: SimpleQueue[Key | type[StopForward] | None] = SimpleQueue()
        self._answers: SimpleQueue[Tensor | BaseException | _Done] = SimpleQueue()
        self._thread: Thread | None = None
        self._output: Tensor | None = None

    def inputs(self, stage: Stage) -> dict[Key, Tensor]:
        (key,) = stage.observed
        answer = self._ask(key)
        return {} if answer is None else {key: answer}

    def finish(self) -> Tensor:
        self._ask(None)
        return _reached(self._output)

    def close(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._orders.put(StopForward)
            self._thread.join()
        self._thread, self._output = None, None

    def _ask(self, key: Key | None) -> Tensor | None:
        """Run on to the product on this key (None: to the end). Returns its input, or None at the end."""
        if self._output is not None:
            return None
        if self._thread is None:
            self._thread = Thread(target=self._work, daemon=True)
            self._thread.start()
        self._orders.put(key)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            self._thread.join()
            raise answer
        if isinstance(answer, _Done):
            self._thread.join()
            self._output = answer.output
            return None
        return answer

    def _work(self) -> None:
        wanted = self._orders.get()

        def see(call: Call) -> None:
            nonlocal wanted
            if key_of(call) == wanted:
                self._answers.put(call.inputs)
                wanted = self._orders.get()
                if wanted is StopForward:
                    raise StopForward

        try:
            with torch.no_grad():
                self._answers.put(_Done(self._run(see)))
        except StopForward:
            pass  # closed: no thread waits for an answer
        except BaseException as error:
            self._answers.put(error)  # it is raised again in the thread that asked


class _Done:
    def __init__(self, output: Tensor) -> None:
        self.output = output


def _reached(output: Tensor | None) -> Tensor:
    if output is None:
        raise RuntimeError("this pass is closed")
    return output


def _ignore(call: Call) -> None:
    return None
