"""The PXD format: read, write, check and apply 1-bit deltas of full fine-tunes. Needs numpy alone.

    import peraxis_format

    with peraxis_format.open("delta.pxd") as delta, peraxis_format.Safetensors.open("base") as base:
        delta.verify()
        peraxis_format.check_base(delta.manifest, base)
        for name in delta:
            weight = peraxis_format.reconstruct(delta.load(name), base.read(name) if name in base else None)

SPEC.md is the normative description; docstrings name its clauses.
"""

from peraxis_format.binding import (
    check_base,
    check_base_bytes,
    check_base_digest,
    check_base_names,
    check_base_tensor,
)
from peraxis_format.bits import mask_width, pack_signs, unpack_signs
from peraxis_format.canonical import canonical_json
from peraxis_format.chain_names import step_name, step_of
from peraxis_format.checkpoint import INDEX_NAME, SINGLE_NAME, Safetensors, TensorInfo
from peraxis_format.container import Header, TensorRecord, file_size, header_bytes, layout
from peraxis_format.delta import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    Axis,
    BaseRef,
    Component,
    ComponentFactors,
    Encoding,
    ModuleDelta,
    encode_scale_pair,
    encode_scales,
    kept_rows,
    scale_factors,
    scale_shapes,
    tensor_shapes,
)
from peraxis_format.dtypes import Array, DType, digest_of, from_float32, raw_bytes, to_float32
from peraxis_format.errors import (
    CODES,
    ArgumentError,
    BackendError,
    BindingError,
    CheckpointError,
    ContainerError,
    PayloadError,
    ProfileError,
    PxdError,
    ShapeError,
    UnsupportedError,
)
from peraxis_format.exact import count_changed, lossless_module
from peraxis_format.files import atomic_file, is_stream, name_lock, new_temporary, remove_leftovers, sync_folder
from peraxis_format.header import read_header
from peraxis_format.manifest import (
    ASSET_PATH,
    CHANGED_KEY,
    COMPONENTS_MAX,
    NO_BASE,
    PART_KEY,
    Asset,
    BaseIdentity,
    Calibration,
    ComponentEntry,
    Identity,
    Manifest,
    ModuleEntry,
    Producer,
)
from peraxis_format.ops.exact import Prefer
from peraxis_format.ops.rebuild import dense_delta, reconstruct
from peraxis_format.profile import NAME
from peraxis_format.reader import DeltaFile, open
from peraxis_format.sizes import ALIGNMENT, aligned, payload_size
from peraxis_format.strict_json import parse_strict_json
from peraxis_format.version import __version__
from peraxis_format.writer import DeltaWriter

__all__ = [
    "ALIGNMENT",
    "ASSET_PATH",
    "CHANGED_KEY",
    "CODES",
    "COMPONENTS_MAX",
    "EXPONENT_MAX",
    "EXPONENT_MIN",
    "INDEX_NAME",
    "NAME",
    "NO_BASE",
    "PART_KEY",
    "SINGLE_NAME",
    "ArgumentError",
    "Array",
    "Asset",
    "Axis",
    "BackendError",
    "BaseIdentity",
    "BaseRef",
    "BindingError",
    "Calibration",
    "CheckpointError",
    "Component",
    "ComponentEntry",
    "ComponentFactors",
    "ContainerError",
    "DType",
    "DeltaFile",
    "DeltaWriter",
    "Encoding",
    "Header",
    "Identity",
    "Manifest",
    "ModuleDelta",
    "ModuleEntry",
    "PayloadError",
    "Producer",
    "Prefer",
    "ProfileError",
    "PxdError",
    "Safetensors",
    "ShapeError",
    "TensorInfo",
    "TensorRecord",
    "UnsupportedError",
    "__version__",
    "aligned",
    "atomic_file",
    "canonical_json",
    "check_base",
    "check_base_bytes",
    "check_base_digest",
    "check_base_names",
    "check_base_tensor",
    "count_changed",
    "dense_delta",
    "digest_of",
    "encode_scale_pair",
    "encode_scales",
    "file_size",
    "from_float32",
    "header_bytes",
    "is_stream",
    "kept_rows",
    "layout",
    "lossless_module",
    "mask_width",
    "name_lock",
    "new_temporary",
    "open",
    "pack_signs",
    "parse_strict_json",
    "payload_size",
    "raw_bytes",
    "read_header",
    "reconstruct",
    "remove_leftovers",
    "scale_factors",
    "scale_shapes",
    "step_name",
    "step_of",
    "sync_folder",
    "tensor_shapes",
    "to_float32",
    "unpack_signs",
]
