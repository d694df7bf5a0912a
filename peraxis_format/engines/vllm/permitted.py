"""The files, folders and URLs that a request may name.

    VLLM_PERAXIS_ROOT is a folder       files below it, by a path relative to it or absolute; no URL and no hub name
    no root, and the server has a key   all that the server can read
    no root and no key                  nothing

vLLM binds all interfaces by default, and without --api-key anyone who reaches the port can send requests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peraxis_format.errors import LiveModelError
from peraxis_format.urls import is_url

__all__ = ["ROOT_VARIABLE", "Permitted"]

ROOT_VARIABLE: Final = "VLLM_PERAXIS_ROOT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Permitted:
    """root: the folder of VLLM_PERAXIS_ROOT, None if it is not set. any_name: without a root, all names are permitted
    and not none.
    """

    root: Path | None
    any_name: bool

    @classmethod
    def of_environment(cls, *, any_name: bool) -> Permitted:
        """The root of this process. Raises LiveModelError if it is not a folder."""
        named = os.environ.get(ROOT_VARIABLE)
        if not named:
            return cls(root=None, any_name=any_name)
        root = Path(named).resolve()
        if not root.is_dir():
            raise LiveModelError(f"{ROOT_VARIABLE} is {named!r}, which is not a folder; name one")
        return cls(root=root, any_name=any_name)

    @classmethod
    def of_server(cls, arguments: Any) -> Permitted:
        """The rules of an API server. arguments: vLLM's, parsed."""
        keys = getattr(arguments, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        return cls.of_environment(any_name=any(keys))

    def source(self, name: str) -> str:
        """The name to open, for the name in a request: below a root an absolute path without links. Raises
        PermissionError.
        """
        if self.root is None:
            if self.any_name:
                return name
            raise PermissionError(
                f"requests cannot name files, because this server has no key; set {ROOT_VARIABLE} to the folder of the "
                "deltas, or start it with --api-key"
            )
        if "\0" not in name and not is_url(name):
            path = Path(os.path.realpath(self.root / name))  # links are followed, so that they cannot lead out
            if path.is_relative_to(self.root):
                return str(path)
        raise PermissionError(f"{name!r} is not a path below the {ROOT_VARIABLE} of this server")
