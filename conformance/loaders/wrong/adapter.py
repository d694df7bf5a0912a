"""An adapter around the small reader: `python adapter.py [--wrong SWITCH] caps | decode | apply | serve`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from arithmetic import Part, decoded, encoded, rebuilt, unpacked
from base import Tensors, read_base
from common import BITS, Rejected, need, phase_of
from reader import Reader
from switches import SWITCHES

__all__ = ["main"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parts_of(reader: Reader, module: dict[str, Any]) -> list[Part]:
    if not module["components"]:
        return []
    *batch, width = reader.covered(module)
    rows = 1
    for size in batch:
        rows *= size
    made = []
    for k, part in enumerate(module["components"]):
        axis = part["axis"]
        words = {"row+col": ("row", "col"), "tensor": ("scalar",)}.get(axis, (axis,))
        signs = unpacked(reader.part_of(module, f"{k}.mask"), rows, width, reader.wrong)
        scales = {word: reader.part_of(module, f"{k}.{word}") for word in words}
        made.append(Part(axis, part["exponent"], signs, scales, reader.wrong))
    return made


def exact(reader: Reader, module: dict[str, Any]) -> bytes:
    word = "full" if module["encoding"] == "full" else "tail" if reader.tail(module) else ""
    return reader.part_of(module, word) if word else b""


def update(reader: Reader, module: dict[str, Any]) -> dict[str, Any]:
    """The keys that only an `exact` module has."""
    if module["encoding"] != "exact":
        return {}
    parts = {f"{word}_sha256": sha256(reader.part_of(module, word)) for word in ("index", "data")}
    return {**parts, "result_sha256": module["result"]}


def decode(reader: Reader) -> dict[str, Any]:
    manifest, modules = reader.manifest, []
    for module in manifest["modules"]:
        components = []
        for k, (part, said) in enumerate(zip(parts_of(reader, module), module["components"], strict=True)):
            scales = b"".join(reader.part_of(module, f"{k}.{word}") for word in part.values)
            components.append({**said, "signs_sha256": sha256(part.signs), "scales_sha256": sha256(scales)})
        held = exact(reader, module)
        modules.append(
            {
                "name": module["name"],
                "dtype": module["dtype"],
                "shape": module["shape"],
                "encoding": module["encoding"],
                "components": components,
                "exact_sha256": sha256(held) if held else None,
            }
            | update(reader, module)
        )
    whole = reader.file[8 : reader.start] if reader.wrong("content-id-of-header") else reader.raw_manifest
    assets = []
    for i, asset in enumerate(manifest["assets"]):
        data = reader.bytes_of(f"__asset__.{i}")
        assets.append({"path": asset["path"], "size": len(data), "sha256": sha256(data)})
    return {
        "ok": True,
        "content_id": "sha256:" + sha256(whole),
        "modules": modules,
        "tied": manifest["tied"],
        "dropped": manifest["dropped"],
        "assets": assets,
        "metadata": manifest["metadata"],
        "previous": manifest.get("previous"),
        "result": manifest.get("result"),
    }


def bind(reader: Reader, base: Tensors) -> Tensors:
    """SPEC 7."""
    wrong, found, wanted = reader.wrong, {}, {}
    lower = {name.lower(): value for name, value in base.items()}
    short = {name.removeprefix("model."): value for name, value in base.items()}
    if wrong("base-dtypes-all-known") and any(dtype not in BITS for dtype, _, _ in base.values()):
        raise Rejected("E403")
    for module in reader.manifest["modules"]:
        name, said = module["name"], module["base"]
        if said is None or (wrong("full-needs-no-base") and module["encoding"] == "full"):
            continue
        wanted[name] = said
        held = (
            lower.get(name.lower())
            if wrong("match-without-case")
            else short.get(name, base.get(name))
            if wrong("prefix-stripped")
            else base.get(name)
        )
        if held is None:
            continue
        size = len(held[2]) * 8 % BITS[said["dtype"]] == 0
        fits = held[1] == said["shape"] or wrong("base-shape-ignored") or (wrong("base-size-only") and size)
        typed = held[0] == said["dtype"] or wrong("base-dtype-ignored") or wrong("base-size-only")
        if not (fits and typed):
            raise Rejected("E403")
        unchecked = wrong("base-bytes-ignored") or (wrong("base-same-bytes-ignored") and module["encoding"] == "same")
        rows = (said["shape"] or [1])[0]
        if wrong("base-bytes-used-only") and module["encoding"] != "full" and reader.covered(module)[:1] < [rows]:
            unchecked = True
        if sha256(held[2]) != said["sha256"] and not unchecked:
            raise Rejected("E404")
        found[name] = held
    if wanted and not found and not wrong("no-match-is-base"):
        raise Rejected("E401")
    if found and len(found) < len(wanted) and not wrong("partial-match"):
        raise Rejected("E402")
    return found


def apply(reader: Reader, base: Tensors) -> Tensors:
    """SPEC 6."""
    found, made = bind(reader, base), {}
    for module in reader.manifest["modules"]:
        name, dtype, shape = module["name"], module["dtype"], module["shape"]
        held = exact(reader, module)
        if module["encoding"] == "full":
            data = held
        elif name not in found:
            continue
        else:
            data = covered_bytes(reader, module, found[name])
            tail = found[name][2][: len(held)] if reader.wrong("tail-from-base") else held
            data = tail + data if reader.wrong("tail-first") else data + tail
            if module["encoding"] == "exact" and not reader.wrong("result-not-checked"):
                checked = data[: len(data) - len(tail)] if reader.wrong("result-of-covered") else data
                need(sha256(checked) == module["result"], "E405")
        made[name] = (dtype, shape, data)
    if not reader.wrong("aliases-left-out"):
        made |= {alias: made[name] for name, alias in reader.manifest["tied"] if name in made}
    if reader.wrong("dropped-kept"):
        made |= {name: base[name] for name in reader.manifest["dropped"] if name in base}
    return {**base, **made} if reader.wrong("base-copied") else made


def covered_bytes(reader: Reader, module: dict[str, Any], held: tuple[str, list[int], bytes]) -> bytes:
    wrong, dtype, shape = reader.wrong, module["dtype"], reader.covered(module)
    count = 1
    for size in shape:
        count *= size
    said = module["base"]["dtype"]
    width = max(BITS[said], 8) if wrong("same-of-whole-bytes") else BITS[said]
    raw = held[2][: count * width // 8]
    if module["encoding"] == "exact":
        return reader.updates(module).applied(raw)
    same = module["encoding"] == "same"
    if same and (dtype == said or wrong("same-reinterprets")) and not wrong("same-canonical-nan"):
        return raw if dtype == said else raw.ljust(count * BITS[dtype] // 8, b"\0")[: count * BITS[dtype] // 8]
    if said not in ("BF16", "F16", "F32"):
        return raw
    values = decoded(raw, said)
    if same:
        data = b"".join(encoded(value, dtype, wrong) for value in values)
        return keep_nan(data, raw, said, dtype) if wrong("same-keeps-nan") else data
    data = rebuilt(values, parts_of(reader, module), shape, dtype, wrong)
    if wrong("nan-payload-kept") or wrong("nan-sign-kept"):
        data = keep_nan(data, raw, said, dtype, sign_only=wrong("nan-sign-kept"))
    return data


def keep_nan(data: bytes, raw: bytes, said: str, dtype: str, *, sign_only: bool = False) -> bytes:
    """The result with the base's NaNs instead of canonical ones, as after a plain cast."""
    a, b = BITS[said] // 8, BITS[dtype] // 8
    made = bytearray(data)
    for i, value in enumerate(decoded(raw, said)):
        if value != value:
            made[(i + 1) * b - 1] |= raw[(i + 1) * a - 1] & 0x80
            if not sign_only:
                made[i * b] |= 1
    return bytes(made)


def write(path: str, tensors: Tensors) -> None:
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def dump(reader: Reader, folder: str) -> None:
    for i, module in enumerate(reader.manifest["modules"]):
        for k, part in enumerate(parts_of(reader, module)):
            scales = b"".join(reader.part_of(module, f"{k}.{word}") for word in part.values)
            Path(folder, f"{i}.{k}.signs").write_bytes(part.signs)
            Path(folder, f"{i}.{k}.scales").write_bytes(scales)
        if held := exact(reader, module):
            Path(folder, f"{i}.exact").write_bytes(held)


def caps(switch: str) -> dict[str, Any]:
    return {
        "protocol": 1,
        "implementation": f"small reader ({switch or 'right'})",
        "version": "1",
        "spec": ["1.0"],
        "features": ["exact"],
        "operations": ["decode", "apply", "dump", "serve"],
    }


def answer(switch: str, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """One operation: (exit status, result)."""
    operation, *rest = arguments
    if operation == "caps":
        return 0, caps(switch)
    options = dict(zip(rest[1::2], rest[2::2], strict=True))
    if switch == "rejects-everything":
        return 1, {"ok": False, "phase": "container", "code": "E109"}
    try:
        if switch == "output-before-checks" and "--out" in options:
            Path(options["--out"]).write_bytes(b"")
        if (
            switch == "binding-before-payload"
            and "--base" in options
            and not set(bases(rest[0])) <= set(read_base(options["--base"], switch))
        ):
            raise Rejected("E402")
        reader = Reader(rest[0], switch)
        if operation == "decode":
            result = decode(reader)
            if "--dump" in options:
                dump(reader, options["--dump"])
            return 0, result
        if operation == "apply":
            write(options["--out"], apply(reader, read_base(options["--base"], switch)))
            return 0, {"ok": True}
    except Rejected as error:
        code = str(error)
        if switch == "accepts-everything":
            return 0, {"ok": True}
        return 1, {"ok": False, "phase": "container" if switch == "one-phase" else phase_of(code), "code": code or None}
    return 77, {"ok": False}


def bases(path: str) -> list[str]:
    data = Path(path).read_bytes()
    manifest = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["manifest"])
    return [module["name"] for module in manifest["modules"] if module.get("base", "like it")]


def serve(switch: str) -> int:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            status, result = answer(switch, request["argv"])
        except (Exception, RecursionError) as error:  # A wrong loader may break in any way; the kit must see it.
            status, result = 70, {"error": repr(error)}
        sys.stdout.write(json.dumps({"id": request["id"], "exit": status, "result": result}) + "\n")
        sys.stdout.flush()
    return 0


def main(arguments: list[str]) -> int:
    """The command."""
    switch = ""
    if arguments[:1] == ["--wrong"]:
        switch, arguments = arguments[1], arguments[2:]
        if switch not in SWITCHES:
            sys.stderr.write(f"unknown switch {switch}; there are: {' '.join(SWITCHES)}\n")
            return 64
    if arguments == ["serve"]:
        return serve(switch)
    status, result = answer(switch, arguments)
    sys.stdout.write(json.dumps(result) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
