"""Read torch.save files that hold plain tensors, within memory that the file's own size bounds.

`weights_only=True` keeps torch.load from running code, but a small file can still ask for much memory: by packed zip
records, by objects that allocate (bytearray), and by tensors that repeat a few bytes (strides of 0). So the names that
a file uses are checked before it is loaded, and its tensors after it: they must be dense, on the CPU, and together no
larger than the bytes that the file stores.
"""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from peraxis_tools.errors import ToolError, first_line

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_plain", "is_torch_file", "load_plain"]

_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = b"\x80"
_PICKLES: Final = 5  # of a file older than torch 1.6: magic, version, system, content, keys of the storages
# Names of dense tensors, their storages, dtypes and shapes.
_PLAIN: Final = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch(\.storage)? \w+Storage|torch Size|torch [a-z]\w*"
)


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as torch.save writes it: a zip archive, or a pickle of torch before 1.6."""
    with open(path, "rb") as file:
        return file.read(len(_ZIP)).startswith((_ZIP, _PICKLE))


def load_plain(source: Path | bytes, *, where: str, kind: str) -> Any:
    """torch.load of a file or its bytes. where: names it in errors. kind: the expected file, like "a .pt file".

    A zip file (since torch 1.6) on disk is mapped, so its tensors are read one by one. Check the tensors with
    `check_plain`. Raises ToolError.
    """
    import torch

    try:
        with _opened(source) as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
            for used in _names(file, is_zip=is_zip):
                if not _PLAIN.fullmatch(used):
                    raise _refusal(where, used)
        opened = source if isinstance(source, Path) else io.BytesIO(source)
        mapped = is_zip and isinstance(source, Path)
        return torch.load(opened, map_location="cpu", weights_only=True, mmap=mapped)
    except ToolError:
        raise
    except Exception as error:  # torch raises many types for a damaged file
        raise ToolError(f"{where}: not {kind}, or damaged ({first_line(error)[:120]})") from None


def check_plain(tensors: Iterable[tuple[str, Tensor]], *, size: int, where: str) -> None:
    """Check that tensors are dense, on the CPU, and no larger than their storages, which have at most `size` bytes.

    Tensors that share all their bytes count once. Raises ToolError.
    """
    used: dict[tuple[int, int], int] = {}  # storage -> bytes of its tensors
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in tensors:
        if not _is_dense(tensor):
            raise ToolError(f"{where}: {name} is not a dense tensor on the CPU; save it as one")
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        view = (key, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view in seen:
            continue
        seen.add(view)
        used[key] = used.get(key, 0) + tensor.numel() * tensor.element_size()
        if used[key] > key[1]:
            raise ToolError(f"{where}: {name} repeats bytes of the file; save a contiguous copy of each tensor")
    if sum(length for _, length in used) > size:
        raise ToolError(f"{where}: its tensors are larger than the file; it is damaged")


def _is_dense(tensor: Tensor) -> bool:
    import torch

    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[BinaryIO]:
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        yield file


def _names(file: BinaryIO, *, is_zip: bool) -> Iterator[str]:
    """The names that the file's pickles import, as "module name". Raises ValueError for a malformed file."""
    if is_zip:
        yield from _names_of(io.BytesIO(_content(file)))
        return
    file.seek(0)
    for _ in range(_PICKLES):
        yield from _names_of(file)


def _names_of(file: BinaryIO) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            yield str(argument or "an import by name")


def _content(file: BinaryIO) -> bytes:
    """The pickle of a zip file. Its records must be stored as they are, so that they are no larger than the file."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed")
        if sum(record.file_size for record in records) > file.seek(0, io.SEEK_END):
            raise ValueError("its records overlap")
        pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records data.pkl")
        return archive.read(pickles[0])


def _refusal(where: str, used: str) -> ToolError:
    name = used.replace(" ", ".")[:80]
    if name.startswith("torch."):
        return ToolError(f"{where}: holds {name}, which is not part of a dense tensor; save dense tensors on the CPU")
    return ToolError(
        f"{where}: has Python objects beside tensors ({name}); it is not opened, because that could run code"
    )
