"""Read HTTP answers only up to the requested number of bytes.

fsspec reads an answer whole, and unpacks it, before its length is checked: a server that ignores a range, that packs
its answer, or that does not stop would fill the memory or the disk. Here an answer is read piece by piece, up to the
requested bytes, and must not be packed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, BinaryIO, Final

__all__ = ["AnswerError", "read_range", "refusal", "save_all"]

_PIECE: Final = 1 << 20
_PULL: Final = "fetch the whole file with `pull`"


class AnswerError(Exception):
    """A server, or a store, sent other bytes than those that it was asked for; the message lacks the URL."""


def read_range(system: Any, path: str, offset: int, end: int) -> bytes:
    """The bytes [offset, end) of a file. system: fsspec's HTTP file system.

    Raises AnswerError if the server sends another number of bytes, and the errors of aiohttp.
    """
    from fsspec.asyn import sync

    data: bytes = sync(system.loop, _range, system, path, offset, end)
    return data


def save_all(system: Any, path: str, file: BinaryIO, size: int, step: Callable[[int], None]) -> None:
    """Write a whole file of `size` bytes. step: called with the bytes of each piece.

    Raises AnswerError if the server sends another number of bytes, and the errors of aiohttp.
    """
    from fsspec.asyn import sync

    sync(system.loop, _save, system, path, file, size, step)


@asynccontextmanager
async def _answer(system: Any, path: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    session = await system.set_session()
    async with session.get(system.encode_url(path), **{**system.kwargs, "headers": headers}) as answer:
        if answer.status == 404:
            raise FileNotFoundError(path)
        answer.raise_for_status()
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise AnswerError(
                f"the server sent {encoding[:32]!r} data, which was not asked for; download it and pass the file"
            )
        yield answer


def refusal(error: BaseException | None) -> str | None:
    """What a server answered instead of a file, with a remedy; None for other errors.

    fsspec says FileNotFoundError for all of them, so the causes are searched.
    """
    while error is not None:
        status = getattr(error, "status", None)
        if type(error).__module__.startswith("aiohttp") and isinstance(status, int) and status >= 400:
            return f"the server answered {status}{_meaning(status)}"
        if type(error).__name__ == "TooManyRedirects":
            return "the server redirects without an end; name the file's own address"
        if type(error).__name__ == "NonHttpUrlRedirectClientError":
            return "the server redirects to an address that is not http; name the file's own address"
        error = error.__cause__ or error.__context__
    return None


def _meaning(status: int) -> str:
    if status in (401, 403, 407):
        return ", which means that a login or a permission is missing; get a URL that you may read"
    if status == 429 or status >= 500:
        return ", which is a fault of the server; try again later"
    return "; check the address"


async def _range(system: Any, path: str, offset: int, end: int) -> bytes:
    wanted = end - offset
    async with _answer(system, path, {"Range": f"bytes={offset}-{end - 1}"}) as answer:
        if answer.status != 206 and offset:
            raise AnswerError(f"the server does not send ranges; {_PULL}")
        data = bytearray()
        while len(data) <= wanted and (piece := await answer.content.read(_PIECE)):
            data += piece
        sent_range = answer.status == 206
    if len(data) > wanted and not sent_range:
        raise AnswerError(f"the server does not send ranges; {_PULL}")
    if len(data) > wanted:
        raise AnswerError(f"the server sent more than the {wanted} bytes of a range; {_PULL}")
    if len(data) < wanted:
        raise AnswerError(f"the server sent {len(data)} bytes for a range of {wanted}; {_PULL}")
    return bytes(data)


async def _save(system: Any, path: str, file: BinaryIO, size: int, step: Callable[[int], None]) -> None:
    done = 0
    async with _answer(system, path, {}) as answer:
        while piece := await answer.content.read(_PIECE):
            done += len(piece)
            if done > size:
                raise AnswerError(
                    f"the server sends more than the {size} bytes that it announced; download it and pass the file"
                )
            file.write(piece)
            step(len(piece))
    if done < size:
        raise AnswerError(f"the server sent {done} of {size} bytes; fetch it again")
