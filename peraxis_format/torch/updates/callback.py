"""A callback for the Trainer of transformers and of TRL that publishes the model during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Unpack

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peraxis_format.arguments import check_least, check_path, did_you_mean
from peraxis_format.errors import ArgumentError
from peraxis_format.torch.place.pieces import is_dtensor
from peraxis_format.torch.updates.publish import UpdateWriter
from peraxis_format.torch.updates.publish_sharded import ShardedUpdateWriter
from peraxis_format.torch.updates.published import UpdateOptions

__all__ = ["PublishUpdates"]

_OPTIONS: Final = frozenset(UpdateOptions.__annotations__)


class PublishUpdates(TrainerCallback):
    """Publishes every `publish_every` optimizer steps, at the beginning and at the end. Process 0 publishes, or all
    processes if the model is sharded (DTensors of fully_shard).

        Trainer(model=model, ..., callbacks=[PublishUpdates("chain", publish_every=10)])

    group: the torch.distributed group of a sharded model (None: all ranks). options: those of UpdateWriter. The files
    are numbered by updates, not by optimizer steps. Raises ArgumentError.
    """

    def __init__(
        self, folder: str | Path, *, publish_every: int = 1, group: Any = None, **options: Unpack[UpdateOptions]
    ) -> None:
        check_path("folder", folder)
        check_least("publish_every", publish_every, 1)
        unknown = sorted(options.keys() - _OPTIONS)
        if unknown:
            hint = did_you_mean(unknown[0], _OPTIONS)
            raise ArgumentError(f"{unknown[0]}: not an option; known are {', '.join(sorted(_OPTIONS))}{hint}")
        self.writer: UpdateWriter | None = None
        self._folder = folder
        self._every = publish_every
        self._group = group
        self._options = options
        self._last = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the folder and publish the initial state."""
        model = kwargs["model"]
        if any(map(is_dtensor, model.parameters())):
            self.writer = ShardedUpdateWriter(model, self._folder, group=self._group, **self._options)
        elif state.is_world_process_zero:
            self.writer = UpdateWriter(model, self._folder, **self._options)
        self._publish(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish if the step is a multiple of `publish_every`."""
        if state.global_step % self._every == 0:
            self._publish(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the final state."""
        self._publish(state)

    def _publish(self, state: TrainerState) -> None:
        if self.writer is not None and self._last != state.global_step:
            self.writer.step()
            self._last = state.global_step
