"""Content -> the bytes of a PXD file, with a hook at each step so that a case can plant exactly one fault.

    tensors -> pads -> digests -> manifest -> text -> records -> header -> file

A hook runs before the steps that follow it, so its fault is the only one: a payload that is changed in `tensors` gets
matching digests, and a manifest that is changed in `manifest` gets its base digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .content import Base, Content, Module, words

__all__ = [
    "MAGIC",
    "Tensor",
    "base_digest",
    "bases",
    "build",
    "canonical",
    "expected",
    "frame",
    "header_json",
    "manifest_text",
    "result_digest",
    "safetensors",
    "table",
    "untabled",
]

MAGIC = '{"__metadata__":{"format":"pxd","pxd":"'
ALIGNMENT = 64
PAGE = 4096
# Among ASCII texts the order of code points is that of UTF-16.
ASCII_ORDER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One record of the header with its bytes; owner is ("module" | "asset" | "pad", index)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    owner: tuple[str, int]


Record = dict[str, Any]


def canonical(value: Any) -> str:
    """RFC 8785 over null, booleans, integers, strings, arrays and objects (SPEC 3.2)."""
    if (text := ASCII_ORDER.encode(value)).isascii():
        return text
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{quoted(key)}:{canonical(value[key])}" for key in keys) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def quoted(text: str) -> str:
    """A JSON string as RFC 8785, section 3.2.2.2, writes it: as Python does, beyond ASCII too."""
    return json.dumps(text, ensure_ascii=False)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def mask(signs: bytes, width: int) -> bytes:
    """SPEC 5.1: least significant bit first, each row of `width` signs padded to whole bytes."""
    rows = (signs[i : i + width] for i in range(0, len(signs), width))
    return b"".join(sum(bit << j for j, bit in enumerate(row)).to_bytes(-(-width // 8), "little") for row in rows)


def filled(parts: Sequence[bytes]) -> bytes:
    """SPEC 4.2: consecutive parts, each padded with zeros to a multiple of 64."""
    return b"".join(part + bytes(-len(part) % ALIGNMENT) for part in parts)


def module_tensor(index: int, module: Module) -> list[Tensor]:
    """SPEC 4.1: the tensor of one module, or none."""
    owner, covered, parts = ("module", index), module.covered, []
    if module.encoding == "full":
        name = f"{module.name}.full"
        return [Tensor(name=name, dtype=module.dtype, shape=module.shape, data=module.exact, owner=owner)]
    for part in module.components:
        parts.append(mask(part.signs, covered[-1] if covered else 1))
        parts.extend(words(values) for _, values in part.scales)
    if module.encoding == "exact":
        parts += [words(module.index, 4), module.data]
    if module.tail:
        parts.append(module.exact)
    data = filled(parts)
    return [Tensor(name=f"{module.name}.delta", dtype="U8", shape=(len(data),), data=data, owner=owner)] if data else []


def laid_out(content: Content) -> list[Tensor]:
    """SPEC 4.2: every tensor of the file, with pads."""
    plain = [tensor for i, module in enumerate(content.modules) for tensor in module_tensor(i, module)]
    for i, asset in enumerate(content.assets):
        shape = (len(asset.data),)
        plain.append(Tensor(name=f"__asset__.{i}", dtype="U8", shape=shape, data=asset.data, owner=("asset", i)))
    made: list[Tensor] = []
    end = pads = 0
    for tensor in plain:
        if gap := -end % ALIGNMENT:
            made.append(Tensor(name=f"__pad__.{pads}", dtype="U8", shape=(gap,), data=bytes(gap), owner=("pad", pads)))
            pads += 1
        made.append(tensor)
        end += gap + len(tensor.data)
    return made


def offsets(tensors: Sequence[Tensor]) -> list[Record]:
    """The records of tensors that follow each other."""
    made, end = [], 0
    for tensor in tensors:
        begin, end = end, end + len(tensor.data)
        made.append(
            {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        )
    return made


def ranges(tensors: Sequence[Tensor], kind: str) -> dict[int, tuple[int, int]]:
    """SPEC 4.3: index -> [begin, end) of each module or asset."""
    found: dict[int, tuple[int, int]] = {}
    for tensor, record in zip(tensors, offsets(tensors), strict=True):
        if tensor.owner[0] == kind:
            begin, end = record["data_offsets"]
            found[tensor.owner[1]] = (found.get(tensor.owner[1], (begin, end))[0], end)
    return found


def table(digests: Sequence[str]) -> str:
    """SPEC 3.13: hex digests as base64 without padding."""
    return base64.b64encode(bytes.fromhex("".join(digests))).decode().rstrip("=")


def untabled(text: str) -> list[str]:
    """The hex digests of a table."""
    raw = base64.b64decode(text + "=" * (-len(text) % 4))
    return [raw[i : i + 32].hex() for i in range(0, len(raw), 32)]


def rows(manifest: dict[str, Any]) -> Iterator[tuple[list[Any] | None, list[Any]]]:
    """[name, dtype, shape, hex digest] of each module's base tensor, or None, and of its new tensor ("": unknown)."""
    digests = iter(untabled(manifest["digests"]))
    for m in manifest["modules"]:
        dtype, shape, encoding = m.get("dtype", "BF16"), m["shape"], m.get("encoding")
        base = m.get("base", {"dtype": dtype, "shape": shape})
        old = [m["name"], base["dtype"], base["shape"], next(digests, "")] if base else None
        grown = bool(base and shape and base["shape"] and shape[0] > base["shape"][0])
        own = next(digests, "") if encoding != "same" or grown else ""
        made = {"full": own, "exact": next(digests, "") if encoding == "exact" else ""}.get(encoding, "")
        if encoding == "same" and old and old[1:3] == [dtype, shape]:
            made = old[3]
        yield old, [m["name"], dtype, shape, made]


def bases(manifest: dict[str, Any]) -> Iterator[list[Any]]:
    """[name, dtype, shape, hex digest] of the base tensor of each module that has one."""
    return (old for old, _ in rows(manifest) if old)


def result_digest(manifest: dict[str, Any]) -> str | None:
    """SPEC 3.14."""
    made = [new for _, new in rows(manifest)]
    return base_digest(made) if all(new[3] for new in made) else None


def base_digest(listed: Iterable[list[Any]]) -> str:
    """SPEC 3.11, of [name, dtype, shape, hex digest] each."""
    ordered = sorted(listed, key=lambda row: row[0].encode("utf-8", "surrogatepass"))
    return "sha256:" + sha256(canonical(ordered).encode())


def module_json(module: Module) -> dict[str, Any]:
    """SPEC 3.4: a module without its usual values."""
    made: dict[str, Any] = {"name": module.name, "shape": list(module.shape)}
    usual = module.base == Base(dtype=module.dtype, shape=module.shape, data=module.base.data) if module.base else False
    if not usual:
        made["base"] = module.base and {"dtype": module.base.dtype, "shape": list(module.base.shape)}
    if module.dtype != "BF16":
        made["dtype"] = module.dtype
    if module.encoding == "sign":
        made["components"] = [[c.axis, c.exponent] for c in module.components]
    else:
        made["encoding"] = module.encoding
    if module.encoding == "exact":
        made["size"] = len(module.data)
    return made


def manifest_of(content: Content, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """SPEC 3.4, without the base digest and the result."""
    data = b"".join(tensor.data for tensor in tensors)
    held = ranges(tensors, "module")
    digests = []
    for i, module in enumerate(content.modules):
        digests += [sha256(module.base.data)] if module.base else []
        digests += [sha256(data[slice(*held[i])])] if i in held else []
        digests += [sha256(module.new + module.exact)] if module.encoding == "exact" else []
    assets = ranges(tensors, "asset")
    return {
        "assets": [{"path": a.path, "sha256": sha256(data[slice(*assets[i])])} for i, a in enumerate(content.assets)],
        "base": {"id": content.base[0], "revision": content.base[1], "digest": ""},
        "calibration": content.calibration,
        "digests": table(digests),
        "dropped": list(content.dropped),
        "features": content.features,
        "fine_tuned": {"id": content.fine_tuned[0], "revision": content.fine_tuned[1]},
        "metadata": dict(content.metadata),
        "modules": [module_json(module) for module in content.modules],
        "producer": {"name": content.producer[0], "version": content.producer[1]},
        "tied": [list(pair) for pair in content.tied],
        **({"previous": content.previous, "result": ""} if content.features else {}),
    }


def header_json(version: str, text: str, records: Sequence[Record]) -> str:
    """SPEC 2, the grammar, without the spaces at the end."""
    entries = [f'{{"__metadata__":{{"format":"pxd","pxd":{quoted(version)},"manifest":{quoted(text)}}}']
    for record in records:
        fields = {key: value for key, value in record.items() if key != "name"}
        entries.append(f"{quoted(record['name'])}:{json.dumps(fields, separators=(',', ':'))}")
    return ",".join(entries) + "}"


def frame(header: bytes, data: bytes, *, spaces: int | None = None) -> bytes:
    """SPEC 2.3: N, the header and its spaces, the data."""
    padded = header + b" " * (-(8 + len(header)) % PAGE if spaces is None else spaces)
    return len(padded).to_bytes(8, "little") + padded + data


def unchanged(value: Any) -> Any:
    return value


Hook = Callable[[Any], Any]


def build(
    content: Content,
    *,
    version: str = "1.0",
    tensors: Hook = unchanged,
    manifest: Hook = unchanged,
    digested: Hook = unchanged,
    text: Hook = unchanged,
    records: Hook = unchanged,
    header: Hook = unchanged,
    data: Hook = unchanged,
    file: Hook = unchanged,
) -> bytes:
    """The file of `content`; each hook takes and returns the result of its step (digested: after the digests)."""
    placed = tensors(laid_out(content))
    made = manifest(manifest_of(content, placed))
    if isinstance(made.get("base"), dict) and made["base"].get("digest") == "":
        made["base"]["digest"] = base_digest(bases(made))
    if made.get("result") == "":
        made["result"] = result_digest(made)
    made = digested(made)
    written = header(header_json(version, text(canonical(made)), records(offsets(placed))))
    encoded = written if isinstance(written, bytes) else written.encode()
    made_file: bytes = file(frame(encoded, data(b"".join(tensor.data for tensor in placed))))
    return made_file


def safetensors(
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    *,
    metadata: str = "",
    align: int = 8,
    order: Sequence[str] = (),
) -> bytes:
    """A plain safetensors file: name -> (dtype, shape, bytes). order: that of the data, if it is not the header's."""
    entries, begins, end = ([f'"__metadata__":{{"format":{quoted(metadata)}}}'] if metadata else []), {}, 0
    for name in order or tensors:
        begins[name], end = end, end + len(tensors[name][2])
    for name, (dtype, shape, raw) in tensors.items():
        fields = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[name], begins[name] + len(raw)]}
        entries.append(f"{quoted(name)}:{json.dumps(fields, separators=(',', ':'))}")
    header = ("{" + ",".join(entries) + "}").encode()
    header += b" " * (-len(header) % align)
    return len(header).to_bytes(8, "little") + header + b"".join(tensors[name][2] for name in order or tensors)


def manifest_text(file: bytes) -> str:
    """The manifest of a file as it is written."""
    return str(json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]["manifest"])


def expected(content: Content, file: bytes) -> dict[str, Any]:
    """What an adapter's `decode` must say of the file of `content`."""
    text = manifest_text(file)
    modules = [
        {
            "name": m.name,
            "dtype": m.dtype,
            "shape": list(m.shape),
            "encoding": m.encoding,
            "components": [
                {
                    "axis": c.axis,
                    "exponent": c.exponent,
                    "signs_sha256": sha256(c.signs),
                    "scales_sha256": sha256(b"".join(words(values) for _, values in c.scales)),
                }
                for c in m.components
            ],
            "exact_sha256": sha256(m.exact) if m.exact else None,
        }
        | update_of(m)
        for m in content.modules
    ]
    return {
        "content_id": "sha256:" + sha256(text.encode()),
        "modules": modules,
        "tied": [list(pair) for pair in content.tied],
        "dropped": list(content.dropped),
        "assets": [{"path": a.path, "size": len(a.data), "sha256": sha256(a.data)} for a in content.assets],
        "metadata": content.metadata,
    } | {key: value for key, value in json.loads(text).items() if key in ("previous", "result")}


def update_of(module: Module) -> dict[str, Any]:
    """What `decode` says of an `exact` module and of no other."""
    if module.encoding != "exact":
        return {}
    parts = {
        "index_sha256": words(module.index, 4),
        "data_sha256": module.data,
        "result_sha256": module.new + module.exact,
    }
    return {word: sha256(data) for word, data in parts.items()}
