"""`sign` and `verify --signature` work offline, with keys that the tests create."""

from __future__ import annotations

import base64
import datetime
import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.commands.sign import command as sign_command
from peraxis_tools.commands.verify import command as verify_command
from peraxis_tools.compress import compress
from peraxis_tools.deltas.signatures import refuse_stale_signature
from peraxis_tools.deltas.signatures import sign as sign_delta
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.rules import claim_delta
from tests.factories import random_storage, sign_module, write_delta

pytest.importorskip("model_signing")
pytest.importorskip("cryptography")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def write_key(folder: Path, name: str, *, password: bytes | None = None):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = folder / f"{name}.pem"
    kept = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, kept))
    public = folder / f"{name}.pub"
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return key, private, public


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write_delta(tmp_path / "delta.pxd", [sign_module(rng, "a.weight", random_storage(rng, (16, 24)))])


def sign(*arguments: object) -> None:
    result = CliRunner().invoke(sign_command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.exception


def verify(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(verify_command, [str(a) for a in arguments])
    return result.exit_code, result.stdout


def test_an_encrypted_key_signs_with_its_password_alone(
    delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, private, public = write_key(tmp_path, "mine", password="pässwörd".encode())
    for password, told in ((None, "it is encrypted; give its password, in PERAXIS_KEY_PASSWORD"), ("another", "")):
        if password is not None:
            monkeypatch.setenv("PERAXIS_KEY_PASSWORD", password)
        result = CliRunner().invoke(sign_command, [str(delta), "--private-key", str(private)])
        assert isinstance(result.exception, ToolError)
        assert told in str(result.exception)
    monkeypatch.setenv("PERAXIS_KEY_PASSWORD", "pässwörd")
    sign(delta, "--private-key", private)
    assert verify(delta, "--signature", "--public-key", public)[0] == 0


def test_a_signature_holds_for_its_key_and_file_and_for_no_other(delta: Path, tmp_path: Path) -> None:
    _, private, public = write_key(tmp_path, "mine")
    _, _, stranger = write_key(tmp_path, "stranger")
    sign(delta, "--private-key", private)
    assert (tmp_path / "delta.pxd.sig").is_file()
    assert verify(delta, "--signature", "--public-key", public)[0] == 0
    code, shown = verify(delta, "--signature", "--public-key", stranger)
    assert code == 1
    assert "not signed with this key" in shown
    assert "digest_value" not in shown
    rng = np.random.default_rng(1)
    write_delta(delta, [sign_module(rng, "a.weight", random_storage(rng, (16, 24)))])
    code, shown = verify(delta, "--signature", "--public-key", public)
    assert code == 1
    assert "not what delta.pxd.sig was made for" in shown


def test_a_missing_bundle_and_a_missing_key_are_not_verifiable(delta: Path, tmp_path: Path) -> None:
    _, private, public = write_key(tmp_path, "mine")
    code, shown = verify(delta, "--signature", "--public-key", public)
    assert code == 3
    assert "no such bundle" in shown
    sign(delta, "--private-key", private)
    assert verify(delta, "--signature")[0] == 3
    assert verify(delta, "--signature", "--public-key", tmp_path / "gone.pub")[0] == 3


def test_the_bundle_moves_with_the_file(delta: Path, tmp_path: Path) -> None:
    _, private, public = write_key(tmp_path, "mine")
    sign(delta, "--private-key", private)
    (tmp_path / "elsewhere").mkdir()
    moved = delta.rename(tmp_path / "elsewhere" / "renamed.pxd")
    bundle = tmp_path / "delta.pxd.sig"
    assert verify(moved, "--bundle", bundle, "--public-key", public)[0] == 0


@pytest.mark.parametrize("password", [None, "pässwörd"])
def test_certificates_work_in_the_place_of_keys(password: str | None, delta: Path, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    root_key, _, _ = write_key(tmp_path, "root")
    leaf_key, leaf_private, _ = write_key(tmp_path, "leaf", password=None if password is None else password.encode())
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: str, key, issuer: str, signer, *, authority: bool) -> x509.Certificate:
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (subject, issuer)]
        usage = dict.fromkeys(
            (
                *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
                *("encipher_only", "decipher_only"),
            ),
            False,
        )
        return (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=True, key_cert_sign=authority, crl_sign=authority, **usage),
                critical=True,
            )
            .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .sign(signer, hashes.SHA256())
        )

    root = certificate("root", root_key, "root", root_key, authority=True)
    leaf = certificate("leaf", leaf_key, "root", root_key, authority=False)
    strange = certificate("root", leaf_key, "root", leaf_key, authority=True)
    paths = {}
    for name, item in (("root", root), ("leaf", leaf), ("strange", strange)):
        paths[name] = tmp_path / f"{name}.crt"
        paths[name].write_bytes(item.public_bytes(serialization.Encoding.PEM))
    sign_delta(
        delta, private_key=leaf_private, password=password, certificate=paths["leaf"], certificate_chain=paths["root"]
    )
    code, shown = verify(delta, "--signature", "--certificate-chain", paths["root"])
    assert code == 0, shown
    assert verify(delta, "--signature", "--certificate-chain", paths["strange"])[0] == 1


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_key_that_is_no_file_is_not_called_missing(kind: str, delta: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    if kind == "pipe":
        os.mkfifo(key)
    else:
        key.mkdir()
    done = CliRunner().invoke(sign_command, [str(delta), "--private-key", str(key)])
    assert str(done.exception) == f"{key}: is a folder or a pipe; name a file, because it is read more than once"
    code, shown = verify(delta, "--public-key", key)
    assert code == 2
    assert "is a folder or a pipe" in shown


def test_a_key_of_another_kind_is_named(tmp_path: Path, delta: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "other.pem").write_bytes(key.private_bytes(*kinds))
    done = CliRunner().invoke(sign_command, [str(delta), "--private-key", str(tmp_path / "other.pem")])
    assert "no elliptic-curve key; make one" in str(done.exception)


def test_publish_takes_the_signature_of_these_bytes_and_refuses_that_of_the_file_before(
    delta: Path, tmp_path: Path
) -> None:
    _, private, _ = write_key(tmp_path, "mine")
    sign(delta, "--private-key", private)
    refuse_stale_signature(delta)
    rng = np.random.default_rng(1)
    write_delta(delta, [sign_module(rng, "a.weight", random_storage(rng, (16, 24)))])
    with pytest.raises(ToolError, match="was made for other bytes than those of delta"):
        refuse_stale_signature(delta)
    sign(delta, "--private-key", private, "--overwrite")
    refuse_stale_signature(delta)


def test_a_bundle_with_a_digest_of_another_kind_is_not_compared_and_what_is_no_bundle_is_refused(delta: Path) -> None:
    statement = {"predicate": {"resources": [{"digest": "00", "algorithm": "sha256-sharded"}]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    bundle = delta.with_name(f"{delta.name}.sig")
    bundle.write_text(json.dumps({"dsseEnvelope": {"payload": payload}}))
    refuse_stale_signature(delta)
    bundle.write_text("{}")
    with pytest.raises(ToolError, match="is no signature that can be read"):
        refuse_stale_signature(delta)


def test_a_file_that_is_replaced_beside_its_signature_says_so(
    delta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.tools.output_cases import make_inputs  # it imports this file

    make_inputs(tmp_path)
    bundle = tmp_path / "delta.pxd.sig"

    def notes(bundle_changes: bool) -> list[str]:
        caplog.clear()
        with claim_delta(delta, overwrite=True, inputs=()):
            if bundle_changes:
                bundle.unlink(missing_ok=True)
                bundle.write_text("{}")
            with pxd.atomic_file(delta, overwrite=True) as target:
                target.write(b"other bytes")
        return caplog.messages

    assert notes(bundle_changes=False) == []
    assert notes(bundle_changes=True) == []
    assert notes(bundle_changes=False) == [
        f"{bundle}: was made for an earlier delta.pxd; sign it again with `peraxis-tools sign`"
    ]
    compress(tmp_path / "base", tmp_path / "tuned", delta, fit="none", overwrite=True)
    assert f"{bundle}: was made for an earlier delta.pxd" in caplog.text
