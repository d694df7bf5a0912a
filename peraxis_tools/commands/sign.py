"""`peraxis-tools sign`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from peraxis_tools.commands.options import RenamedOption, json_option, overwrite_option, quiet_option, refuse_given
from peraxis_tools.commands.sources import refuse_urls
from peraxis_tools.deltas.signatures import sign
from peraxis_tools.display.progress import staged
from peraxis_tools.report.console import emit
from peraxis_tools.report.sign import render_sign

__all__ = ["command"]

_PASSWORD = "PERAXIS_KEY_PASSWORD"


@click.command("sign")
@click.argument("delta", metavar="DELTA")
@click.option(
    "--private-key",
    "--key",
    cls=RenamedOption,
    required=True,
    type=click.Path(path_type=Path),
    help="The private key: a PEM file with an elliptic-curve key.",
)
@click.option("--certificate", type=click.Path(path_type=Path), help="Sign with this certificate of the key.")
@click.option(
    "--certificate-chain", multiple=True, type=click.Path(path_type=Path), help="A certificate above it. Repeatable."
)
@click.option("--bundle", type=click.Path(path_type=Path), help="The file for the signature.  [default: DELTA.sig]")
@overwrite_option
@json_option
@quiet_option
def command(
    delta: str,
    private_key: Path,
    certificate: Path | None,
    certificate_chain: tuple[Path, ...],
    bundle: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Sign DELTA with a key or a certificate, offline, and write the signature beside it. This needs peraxis[sign].

    The password of a key is read from the environment variable PERAXIS_KEY_PASSWORD.

    \b
    Example: openssl ecparam -name prime256v1 -genkey -noout -out key.pem
             openssl ec -in key.pem -pubout -out key.pub
             peraxis-tools sign delta.pxd --private-key key.pem
             peraxis-tools verify delta.pxd --signature --public-key key.pub
    """
    if certificate is None:
        refuse_given("certificate_chain", why="without --certificate")
    result = sign(
        refuse_urls([delta])[0],
        private_key=private_key,
        password=os.environ.get(_PASSWORD),
        certificate=certificate,
        certificate_chain=certificate_chain,
        bundle=bundle,
        overwrite=overwrite,
        progress=staged(quiet=quiet),
    )
    emit(result, render_sign, schema="peraxis.sign/1", as_json=as_json, written=result.bundle)
