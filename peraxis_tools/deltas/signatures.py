"""Sign a file and check signatures with `model-signing` (OpenSSF Model Signing), key or certificate, offline.

The bundle is written beside the file as `<file>.sig`, in Sigstore's bundle format over an in-toto statement of the
file's SHA-256, so other tools of that library can check it. The library is optional (`pip install peraxis[sign]`).
Nothing here uses a network.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peraxis_tools.arguments import check_paths, refuse_idle, sequence
from peraxis_tools.display.progress import Progress, stages_of
from peraxis_tools.errors import CheckFailedError, NotVerifiableError, ToolError, first_line
from peraxis_tools.outputs.folders import scratch_folder
from peraxis_tools.outputs.rules import claim_file
from peraxis_tools.process.optional import require

__all__ = ["SignResult", "check_signature", "refuse_stale_signature", "sign", "signature_path"]

_BUNDLE_MOST: Final = 1 << 24  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SignResult:
    """The result of `sign`: the signed file and its signature."""

    path: Path
    content_id: str
    bundle: Path
    method: str


def signature_path(file: str | Path) -> Path:
    """The default path of a file's bundle."""
    return Path(f"{Path(file)}.sig")


def refuse_stale_signature(file: Path) -> None:
    """Raise ToolError if the bundle beside a file, if there is one, is not for the file's bytes. This needs no key.

    A bundle is a statement of the SHA-256 of what was signed. Whether the signature holds, `check_signature` says.
    """
    bundle = signature_path(file)
    if not os.path.isfile(bundle):
        return
    signed = _signed_digests(bundle)
    if signed is None:
        raise ToolError(f"{bundle}: is no signature that can be read; remove it, or sign with `peraxis-tools sign`")
    if not signed:  # another tool hashed the file in another way, which only a check with the key follows
        return
    with open(file, "rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() not in signed:
            raise ToolError(
                f"{bundle}: was made for other bytes than those of {file.name}; sign it again with "
                f"`peraxis-tools sign --overwrite`, or remove the signature"
            )


def _signed_digests(bundle: Path) -> set[str] | None:
    """The SHA-256 of the files that a bundle's statement lists, without other digests; None for what is no bundle."""
    try:
        with open(bundle, "rb") as opened:
            envelope = json.loads(opened.read(_BUNDLE_MOST))["dsseEnvelope"]
        resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
        return {str(each["digest"]) for each in resources if each["algorithm"] == "sha256"}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def sign(
    delta: str | Path,
    *,
    private_key: str | Path,
    password: str | None = None,
    certificate: str | Path | None = None,
    certificate_chain: str | Path | Sequence[str | Path] = (),
    bundle: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> SignResult:
    """Verify a delta and sign it with an elliptic-curve key in PEM.

    password: the password of the key. certificate: sign with this certificate of the key. certificate_chain: those
    above it. bundle: the path of the signature, by default `<delta>.sig`. progress: called with numbers of verified
    bytes, or True for bars. Raises ToolError, PxdError, OSError.
    """
    check_paths(delta=delta, private_key=private_key)
    check_paths(certificate=certificate, bundle=bundle, optional=True)
    import peraxis_format as pxd

    if certificate is None:
        refuse_idle("without certificate", certificate_chain=certificate_chain)
    file, private_key = Path(delta), Path(private_key)
    certificate = None if certificate is None else Path(certificate)
    chain = [Path(path) for path in sequence(certificate_chain)]
    bundle = signature_path(file) if bundle is None else Path(bundle)
    inputs = (file, private_key, certificate, *chain)
    stages = stages_of(progress)
    with claim_file(bundle, overwrite=overwrite, inputs=inputs):
        _need(private_key, *([certificate] if certificate is not None else []), *chain)
        with pxd.open(file) as opened:
            with stages("verify", opened.data_size) as step:
                opened.verify(progress=step)
            content_id = opened.content_id
        signing = _library().signing
        with _clear(f"{file}: cannot be signed with {private_key}", ToolError), stages("sign", None):
            config = signing.Config().set_hashing_config(_hashing(bundle))
            secret = None if password is None else password.encode(errors="surrogateescape")
            key = _checked_key(private_key, secret)
            if certificate is None:
                # cryptography, which gets the password from the library as it is, needs bytes.
                config.use_elliptic_key_signer(private_key=private_key, password=secret)
            else:
                with _readable(private_key, key, encrypted=secret is not None) as source:
                    config.use_certificate_signer(
                        private_key=source, signing_certificate=certificate, certificate_chain=chain
                    )
            signature = _signed(config, file)
        with pxd.atomic_file(bundle, overwrite=overwrite) as target:
            target.write(signature)
    return SignResult(
        path=file, content_id=content_id, bundle=bundle, method="key" if certificate is None else "certificate"
    )


def _checked_key(private_key: Path, password: bytes | None) -> Any:
    """The private key of a file. Raises ValueError for one of another kind and for an encrypted one without a password,
    which the library does not name. Raises what cryptography raises.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = private_key.read_bytes()
    if password is None and b"ENCRYPTED" in data:
        raise ValueError("it is encrypted; give its password, in PERAXIS_KEY_PASSWORD or as password")
    key = load_pem_private_key(data, password)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("it is no elliptic-curve key; make one with `openssl ecparam -genkey -noout -name prime256v1`")
    return key


@contextlib.contextmanager
def _readable(private_key: Path, key: Any, *, encrypted: bool) -> Iterator[Path]:
    """A file from which the library reads a key beside a certificate: it does not take a password there.

    An encrypted key is given through a pipe, decrypted, so that it is on no disk.
    """
    from cryptography.hazmat.primitives import serialization

    if not encrypted:
        yield private_key
        return
    if not os.path.isdir("/dev/fd"):
        raise ValueError("it is encrypted, which the library cannot read beside a certificate; decrypt it first")
    plain = serialization.NoEncryption()
    reading, writing = os.pipe()
    with open(reading, "rb"):
        with open(writing, "wb") as pipe:  # a key is smaller than the buffer of a pipe
            pipe.write(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
        yield Path(f"/dev/fd/{reading}")


def _signed(config: Any, file: Path) -> bytes:
    """The bundle's bytes. The library's write is not atomic, so it writes into a temporary folder."""
    with scratch_folder() as folder:
        bundle = folder / "bundle"
        config.sign(file, bundle)
        return bundle.read_bytes()


def check_signature(
    file: str | Path,
    *,
    public_key: str | Path | None = None,
    certificate_chain: str | Path | Sequence[str | Path] = (),
    bundle: str | Path | None = None,
) -> None:
    """Check a file against its bundle: by the public key, or by certificates that the bundle's must chain to.

    Raises NotVerifiableError without key or bundle, CheckFailedError for another key or a changed file.
    """
    file = Path(file)
    public_key = None if public_key is None else Path(public_key)
    chain = [Path(path) for path in sequence(certificate_chain)]
    bundle = signature_path(file) if bundle is None else Path(bundle)
    if public_key is None and not chain:
        raise NotVerifiableError(f"{file}: a signature needs a key or certificates (--public-key, --certificate-chain)")
    _need(*([public_key] if public_key is not None else []), *chain)
    if not bundle.is_file():
        raise NotVerifiableError(f"{bundle}: no such bundle; fetch it from the source of {file.name}")
    verifying = _library().verifying
    config = verifying.Config().set_hashing_config(_hashing(bundle))
    with _clear(f"{', '.join(map(str, [public_key] if public_key else chain))}: cannot be read", ToolError):
        if public_key is not None:
            config.use_elliptic_key_verifier(public_key=public_key)
        else:
            config.use_certificate_verifier(certificate_chain=chain)
    with _clear(f"{file}: not what {bundle.name} was made for, or not signed with this key", CheckFailedError):
        config.verify(file, bundle)


def _need(*paths: Path) -> None:
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ToolError(f"{path}: is a folder or a pipe; name a file, because it is read more than once")
        if not os.path.isfile(path):
            raise NotVerifiableError(f"{path}: no such key or certificate")


def _library() -> Any:
    require("a signature", "model_signing", "OpenSSL")
    import model_signing

    return model_signing


def _hashing(bundle: Path) -> Any:
    config = _library().hashing.Config()
    config.set_ignored_paths(paths=[bundle], ignore_git_paths=False)
    return config


@contextlib.contextmanager
def _clear(what: str, kind: type[ToolError]) -> Iterator[None]:
    """Turn all errors of the library into `kind` of one line, and silence its log."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:  # cryptography, OpenSSL, protobuf and the library itself: each has its own classes
        reason = first_line(error).partition(": [")[0]  # a list of digests as raw bytes follows
        raise kind(f"{what} ({reason})") from None
    finally:
        logging.disable(previous)
