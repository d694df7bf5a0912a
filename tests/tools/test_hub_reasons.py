"""Without a connection the error of a name on the hub is the connection's, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peraxis_format.hub import hub_file, hub_name, hub_reason
from peraxis_tools.checkpoints.checkpoint import open_checkpoint


def failed(*, named: bool) -> BaseException:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            raise ConnectionError("\nGot: name or service not known\nsecond line")
        except ConnectionError as error:
            raise LocalEntryNotFoundError("outgoing traffic has been disabled") from (error if named else None)
    except LocalEntryNotFoundError as error:
        return error


@pytest.mark.parametrize("named", [True, False])
def test_the_reason_is_the_first_line_of_the_cause(named: bool) -> None:
    assert hub_reason(failed(named=named)) == "name or service not known"
    assert hub_reason(ValueError("")) == "ValueError"


@pytest.mark.parametrize(
    "attempt",
    [lambda: hub_file(found) if (found := hub_name("me/delta")) else None, lambda: open_checkpoint("me/base")],
    ids=["delta", "checkpoint"],
)
def test_a_closed_network_is_not_called_a_setting(
    attempt: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from peraxis_format import CheckpointError

    def unreachable(*_: object, **__: object) -> str:
        raise failed(named=True)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"^me/\w+: cannot be fetched from the hub: name or service not known$"):
        attempt()
