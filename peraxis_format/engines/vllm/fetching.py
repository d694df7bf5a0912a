"""URLs in requests are fetched by the API server, before anything waits for them.

Staging stops the engine, and a rank that fetches a file would stop it for as long as the network takes. The ranks of
one host get the path of the fetched file; ranks of several hosts get the URL.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from peraxis_format.engines.vllm.following import RequestError
from peraxis_format.engines.vllm.source import downloaded, shown
from peraxis_format.errors import CheckpointError
from peraxis_format.urls import is_http

__all__ = ["Fetching"]


@dataclass(slots=True)
class Fetching:
    """one_host: all ranks see this host's files. One URL is fetched at a time, so that threads stay for other work."""

    one_host: bool
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def local(self, source: str) -> AsyncIterator[str]:
        """The name under which ranks open a source, during the block. Raises RequestError, of the block too, with the
        URL in the place of the path.
        """
        if not self.one_host or not is_http(source):
            yield source
            return
        fetched = downloaded(source)
        try:
            async with self._lock:
                path = str(await asyncio.to_thread(fetched.__enter__))
        except (CheckpointError, OSError) as error:
            raise RequestError(400, " ".join(str(error).split())) from None
        try:
            yield path
        except RequestError as error:
            raise RequestError(error.status, str(error).replace(path, shown(source))) from None
        finally:
            await asyncio.to_thread(fetched.__exit__, None, None, None)
