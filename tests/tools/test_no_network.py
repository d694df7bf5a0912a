"""Without a network a name on the hub costs one note and one line with the reason."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from peraxis_tools.compress import compress
from peraxis_tools.errors import OptionError
from peraxis_tools.process.quiet import hush_hub
from peraxis_tools.texts import documents
from tests.tools.compress_pairs import FEW, llama_pair

FIT: dict[str, Any] = dict(FEW)

ATTEMPTS = (
    "'[Errno -2] Name or service not known' thrown while requesting HEAD https://huggingface.co/x",
    "Retrying in 1s [Retry 1/5].",
    "HTTP Error 503 thrown while requesting GET https://huggingface.co/x",
    "Retrying in 8s [Retry 5/5].",
)


def test_the_logger_of_attempts_is_that_of_the_hub_library() -> None:
    import huggingface_hub.utils._http as http

    hush_hub()
    source = Path(http.__file__).read_text("utf-8")
    assert http.logger.filters
    assert re.search(r'logger\.warning\(f"Retrying in ', source)
    assert len(re.findall(r'logger\.warning\(f".*thrown while requesting ', source)) == 2


def test_failed_attempts_are_one_note(caplog: pytest.LogCaptureFixture) -> None:
    hush_hub()
    for attempt in (*ATTEMPTS, "Rate limited. Waiting 60s before retry [Retry 1/5]."):
        logging.getLogger("huggingface_hub.utils._http").warning(attempt)
    own = [record.getMessage() for record in caplog.records if record.name == "peraxis"]
    others = [record.getMessage() for record in caplog.records if record.name != "peraxis"]
    assert len(set(own)) == 1  # the command line prints equal notes once
    assert own[0].startswith("the hub does not answer; trying again")
    assert others == ["Rate limited. Waiting 60s before retry [Retry 1/5]."]


@pytest.mark.parametrize(
    ("cause", "reason"),
    [("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"), ("LocalEntryNotFoundError", "it does not answer")],
)
def test_a_text_that_cannot_be_fetched_is_an_error_with_its_reason_before_the_plan(
    cause: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(source: str) -> None:
        raise ConnectionError(f"Couldn't reach 'allenai/c4' on the Hub ({cause})")

    base, tuned, _ = llama_pair(tmp_path)
    monkeypatch.setattr(documents, "_rows", unreached)
    plans: list[object] = []
    message = f"text c4: cannot be read: Couldn't reach 'allenai/c4' on the Hub: {reason}, and the cache has no copy"
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        compress(base, tuned, tmp_path / "x.pxd", calibration="c4", show_plan=plans.append, **FIT)
    assert not plans
