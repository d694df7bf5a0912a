"""Protocol v1 over the reference library: `python adapter.py caps | decode | apply | encode | serve`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import peraxis_format as pxd
from peraxis_format.ops import exact as ops

__all__ = ["answer", "main"]

ACCEPTED, REJECTED, UNSUPPORTED = 0, 1, 77
Answer = tuple[int, dict[str, Any]]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def logical(module: pxd.ModuleDelta) -> Iterator[tuple[str, bytes]]:
    """("<k>.signs" | "<k>.scales" | "exact", bytes): content without its layout."""
    for k, component in enumerate(module.components):
        signs = pxd.unpack_signs(component.mask, module.covered[-1])
        yield f"{k}.signs", signs.astype(np.uint8).tobytes()
        yield f"{k}.scales", b"".join(bytes(pxd.raw_bytes(array)) for array in component.scales().values())
    exact = module.full if module.full is not None else module.tail
    if exact is not None:
        yield "exact", bytes(pxd.raw_bytes(exact))


def described(entry: pxd.ModuleEntry, content: dict[str, bytes]) -> dict[str, Any]:
    components = [
        {
            "axis": part.axis.value,
            "exponent": part.exponent,
            "signs_sha256": sha256(content[f"{k}.signs"]),
            "scales_sha256": sha256(content[f"{k}.scales"]),
        }
        for k, part in enumerate(entry.components)
    ]
    exact = sha256(content["exact"]) if "exact" in content else None
    return {
        "name": entry.name,
        "dtype": entry.dtype.value,
        "shape": list(entry.shape),
        "encoding": entry.encoding.value,
        "components": components,
        "exact_sha256": exact,
    }


def update(module: pxd.ModuleDelta) -> dict[str, Any]:
    """The keys that only an `exact` module has."""
    if module.index is None or module.data is None:
        return {}
    return {
        "index_sha256": sha256(bytes(pxd.raw_bytes(module.index))),
        "data_sha256": sha256(bytes(pxd.raw_bytes(module.data))),
        "result_sha256": module.result,
    }


def decode(path: str, dump: str | None) -> dict[str, Any]:
    """Steps 1 to 11, and the file's content."""
    with pxd.open(path) as delta:
        delta.verify(workers=1)
        modules = []
        for i, entry in enumerate(delta.manifest.modules):
            module = delta[entry.name]
            content = dict(logical(module))
            modules.append(described(entry, content) | update(module))
            for word, data in content.items() if dump else ():
                Path(str(dump), f"{i}.{word}").write_bytes(data)
        assets = {asset.path: delta.asset(asset.path) for asset in delta.manifest.assets}
        return {
            "ok": True,
            "content_id": delta.content_id,
            "modules": modules,
            "tied": [list(pair) for pair in delta.manifest.tied],
            "dropped": list(delta.manifest.dropped),
            "assets": [{"path": path, "size": len(held), "sha256": sha256(held)} for path, held in assets.items()],
            "metadata": dict(delta.manifest.metadata),
            "previous": delta.manifest.previous,
            "result": delta.manifest.result,
        }


def write_safetensors(path: str, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write a checkpoint to one file, so that the adapter needs only the library."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    with pxd.atomic_file(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data for _, _, data in tensors.values())


def apply(path: str, base_path: str, out: str) -> dict[str, Any]:
    """Steps 1 to 12, and the fine-tuned checkpoint."""
    with pxd.open(path) as delta:
        delta.verify(workers=1)
        with pxd.Safetensors.open(base_path) as base:
            pxd.check_base(delta.manifest, base, workers=1)
            made = {}
            for entry in delta.manifest.modules:
                held = base.read(entry.name) if entry.base is not None else None
                weight = pxd.reconstruct(delta.load(entry.name), held)
                made[entry.name] = (entry.dtype.value, entry.shape, bytes(pxd.raw_bytes(weight)))
            made |= {alias: made[name] for name, alias in delta.manifest.tied}
    write_safetensors(out, made)
    return {"ok": True}


def array(folder: Path, name: str, dtype: pxd.DType, shape: tuple[int, ...]) -> Any:
    return np.frombuffer((folder / name).read_bytes(), dtype=dtype.storage).reshape(dtype.storage_shape(shape))


def component(folder: Path, said: dict[str, Any], covered: tuple[int, ...]) -> pxd.Component:
    axis = pxd.Axis(said["axis"])
    signs = np.frombuffer((folder / said["signs"]).read_bytes(), dtype=np.uint8).reshape(covered)
    scales = {
        word: array(folder, said[word], pxd.DType.F16, shape) for word, shape in pxd.scale_shapes(axis, covered).items()
    }
    return pxd.Component(axis=axis, exponent=said["exponent"], mask=pxd.pack_signs(signs.astype(bool)), **scales)


def module(folder: Path, said: dict[str, Any], prefer: Any) -> pxd.ModuleDelta:
    """One entry of content.json as the library's type."""
    shape, dtype, encoding = tuple(said["shape"]), pxd.DType(said["dtype"]), pxd.Encoding(said["encoding"])
    base, held = None, said["base"]
    if held is not None:
        base = pxd.BaseRef(dtype=pxd.DType(held["dtype"]), shape=tuple(held["shape"]), sha256=held["sha256"])
    kept = min(shape[0], base.shape[0]) if base and shape else 0
    covered = (kept, *shape[1:])
    if "new" in said and base is not None:
        old, new = array(folder, said["old"], dtype, base.shape), array(folder, said["new"], dtype, shape)
        return exact_module(said["name"], dtype, base, old, new, prefer)
    exact = {}
    if "exact" in said:
        stored = shape if encoding is pxd.Encoding.FULL else (shape[0] - kept, *shape[1:])
        exact = {"full" if encoding is pxd.Encoding.FULL else "tail": array(folder, said["exact"], dtype, stored)}
    parts = tuple(component(folder, part, covered) for part in said["components"])
    return pxd.ModuleDelta(
        name=said["name"], shape=shape, dtype=dtype, encoding=encoding, base=base, components=parts, **exact
    )


def exact_module(name: str, dtype: pxd.DType, base: pxd.BaseRef, old: Any, new: Any, prefer: Any) -> pxd.ModuleDelta:
    """The step from old to new, or `same` if there is none (SPEC 11.3)."""
    kept = min(len(old), len(new))
    index, data = ops.encode(old[:kept], new[:kept], dtype, prefer=prefer)
    tail = {"tail": new[kept:]} if kept < len(new) else {}
    shared = {"name": name, "shape": new.shape, "dtype": dtype, "base": base, **tail}
    if not data.size:
        return pxd.ModuleDelta(encoding=pxd.Encoding.SAME, **shared)
    result = sha256(bytes(pxd.raw_bytes(new)))
    return pxd.ModuleDelta(encoding=pxd.Encoding.EXACT, index=index, data=data, result=result, **shared)


def encode(source: str, out: str) -> dict[str, Any]:
    """content.json and the files that it names, as one PXD file."""
    folder = Path(source)
    said = json.loads((folder / "content.json").read_bytes())
    calibration = pxd.Calibration(**said["calibration"]) if said["calibration"] else None
    with pxd.DeltaWriter(
        out,
        base=pxd.Identity(**said["base"]),
        fine_tuned=pxd.Identity(**said["fine_tuned"]),
        producer=pxd.Producer(**said["producer"]),
        calibration=calibration,
        metadata=said["metadata"],
        previous=said.get("previous"),
        chained=said.get("chained", False),
    ) as writer:
        for entry in said["modules"]:
            writer.add(module(folder, entry, said.get("prefer", "size")))
        for name, alias in said["tied"]:
            writer.tie(name, alias)
        for name in said["dropped"]:
            writer.drop(name)
        for asset in said["assets"]:
            writer.add_asset(asset["path"], (folder / asset["file"]).read_bytes())
        writer.finish()
    return {"ok": True}


def caps() -> dict[str, Any]:
    return {
        "protocol": 1,
        "implementation": "peraxis_format",
        "version": pxd.__version__,
        "spec": ["1.0"],
        "features": ["exact"],
        "operations": ["decode", "apply", "encode", "dump", "serve"],
    }


def answer(arguments: list[str]) -> Answer:
    """One operation: (exit status, result)."""
    match arguments:
        case ["caps"]:
            return ACCEPTED, caps()
        case ["decode", path]:
            return refusable(lambda: decode(path, None))
        case ["decode", path, "--dump", folder]:
            return refusable(lambda: decode(path, folder))
        case ["apply", path, "--base", base, "--out", out]:
            return refusable(lambda: apply(path, base, out))
        case ["encode", source, "--out", out]:
            try:
                return refusable(lambda: encode(source, out))
            except (pxd.ShapeError, ValueError) as error:  # numpy's word for too few bytes is ValueError
                return REJECTED, {"ok": False, "phase": None, "code": None, "detail": str(error)}
        case _:
            return UNSUPPORTED, {"ok": False}


def refusable(operation: Any) -> Answer:
    try:
        return ACCEPTED, operation()
    except (pxd.ShapeError, pxd.CheckpointError) as error:  # content that no file can hold; a malformed base (SPEC 7.5)
        return REJECTED, {"ok": False, "phase": None, "code": None, "detail": str(error)}
    except pxd.PxdError as error:
        return REJECTED, {"ok": False, "phase": phase(error), "code": error.code, "detail": str(error)}


def phase(error: pxd.PxdError) -> str:
    return {"1": "container", "2": "profile", "3": "payload", "4": "binding"}[error.code[1]]


def serve() -> int:
    """JSON lines: a request in, an answer out."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            status, result = answer(request["argv"])
        except Exception as error:  # The kit counts any other exit status as a failure and goes on.
            status, result = 70, {"error": repr(error)}
        sys.stdout.write(json.dumps({"id": request["id"], "exit": status, "result": result}) + "\n")
        sys.stdout.flush()
    return 0


def main(arguments: list[str]) -> int:
    """The command."""
    if arguments == ["serve"]:
        return serve()
    status, result = answer(arguments)
    sys.stdout.write(json.dumps(result) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
