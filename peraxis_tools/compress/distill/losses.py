"""The teacher's hidden states and the student's losses, one range of tokens at a time.

kl    sum over the vocabulary of p (log p - log q)      p: teacher, q: student
mse   mean over the vocabulary of (x_q - x_p)^2         of the logits
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peraxis_tools.compress.distill.parametrization import BuiltWeights
from peraxis_tools.compress.fit.moments.spill import SpilledTensors
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from peraxis_tools.compress.run.work_folder import WorkFolder
from peraxis_tools.process.heap import trim_heap

__all__ = ["Losses", "TeacherStates", "divergence"]


class TeacherStates:
    """The teacher's last hidden states of samples: kept in files up to a limit of bytes, recomputed beyond it.

    Logits are computed from them, by the teacher's head, for some tokens at a time: they are as much larger as the
    vocabulary is than the width. Each sample is computed alone, so that its logits depend neither on the limit nor on
    its batch.
    """

    def __init__(self, teacher: LayerwiseModel, work: WorkFolder, limit: int) -> None:
        self._teacher, self._limit = teacher, limit
        self._kept = {split: SpilledTensors(work.path, f"teacher-{split}", limit=0) for split in ("fit", "held-out")}

    def keep(self, splits: Mapping[str, Tensor], progress: Callable[[int, int], None]) -> None:
        """Compute the states of all samples of the splits within the limit. If those are all, free all but the head."""
        rows = [(split, row) for split, samples in splits.items() for row in range(len(samples))]
        for done, (split, row) in enumerate(rows):
            progress(done, len(rows))
            states = self._computed(splits[split][row : row + 1])
            size = states.numel() * states.element_size()
            if size > self._limit:
                return
            self._limit -= size
            self._kept[split][row] = states
        progress(len(rows), len(rows))
        for index in range(len(self._teacher)):
            self._teacher.empty(index)
        if not self._teacher.is_tied:
            self._teacher.free_embedding()

    def of(self, ids: Tensor, split: str, rows: Sequence[int]) -> list[Tensor]:
        """The states of some samples of a split, each alone. ids: their tokens [rows, length]."""
        kept = self._kept[split]
        return [kept[row] if row in kept else self._computed(ids[i : i + 1]) for i, row in enumerate(rows)]

    @torch.no_grad()
    def logits(self, ids: Tensor, states: Sequence[Tensor], tokens: slice) -> Tensor:
        """Logits [rows, tokens, vocabulary] of some tokens of samples. states: of `of`."""
        some = [self._teacher.head(ids[i : i + 1, tokens], its[:, tokens]) for i, its in enumerate(states)]
        return torch.cat(some)

    @torch.no_grad()
    def _computed(self, ids: Tensor) -> Tensor:
        return self._teacher.states(ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The student's losses on samples of the splits. kind: kl or mse."""

    student: LayerwiseModel
    built: BuiltWeights
    targets: TeacherStates
    splits: Mapping[str, Tensor]
    kind: str

    def backward(self, split: str, rows: Sequence[int]) -> None:
        """Add the gradients of the mean loss over the tokens of some samples of a split."""
        self.built.clear()
        together = 1 if self.student.device.type == "cpu" else len(rows)
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            ids = self.splits[split][list(some)]
            targets = self.targets.of(ids, split, some)
            with self.built.forgotten():
                states = self.student.states(ids)
            trim_heap()  # the largest tensors, of the head and its table, come next
            given = states.detach().requires_grad_()
            for tokens in self.student.token_ranges(ids, states):
                target = self.targets.logits(ids, targets, tokens)
                with self.built.forgotten():
                    loss = self._sum(target, self.student.head(ids[:, tokens], given[:, tokens]))
                (loss / (len(rows) * ids.shape[1])).backward()
            if states.requires_grad:  # otherwise the head alone is trained
                states.backward(given.grad)

    @torch.no_grad()
    def mean(self, split: str) -> float:
        """The mean loss over all tokens of a split."""
        self.built.clear()
        samples = self.splits[split]
        total = 0.0
        for row in range(len(samples)):
            ids = samples[row : row + 1]
            targets, states = self.targets.of(ids, split, [row]), self.student.states(ids)
            for tokens in self.student.token_ranges(ids, states):
                target = self.targets.logits(ids, targets, tokens)
                total += float(self._sum(target, self.student.head(ids[:, tokens], states[:, tokens])))
        return total / samples.numel()

    def _sum(self, target: Tensor, logits: Tensor) -> Tensor:
        """The sum of the loss over tokens. target, logits: [samples, tokens, vocabulary]."""
        target, logits = target.float(), logits.float()
        if self.kind == "mse":
            return torch.mean((logits - target).square(), dim=-1).sum()
        return divergence(target, logits)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """The sum over tokens of KL(teacher || student). target, logits: float32 [..., vocabulary]."""
    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(logits, -1)
    return torch.sum(log_p.exp() * (log_p - log_q))
