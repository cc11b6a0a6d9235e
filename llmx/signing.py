"""A thin wrapper of the package model-signing: signatures by a key of one's own, made and checked without a network.

What it writes is a Sigstore bundle over one file, which `model_signing verify key` checks as well.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, RuntimeMissing, UsageError


def sign_file(path: Path, signature: Path, key: Path) -> None:
    """Write the signature of a file. key: an unencrypted private key on an elliptic curve, PEM.

    Raises: RuntimeMissing without the package, UsageError for a key that cannot be used.
    """
    signing = _module("signing")
    if not key.is_file():
        raise UsageError("there is no such key", where=key)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the private key cannot be used: {_first_line(error)}",
            where=key,
            fix="make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        ) from error
    config.sign(path, signature)


def check_file(path: Path, signature: Path, public_key: Path) -> None:
    """Raises: IntegrityError where the signature is not by this key or not of this file, UsageError for a file that is
    no public key, RuntimeMissing without the package."""
    verifying = _module("verifying")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError) as error:
        fix = "openssl ec -in key.pem -pubout -out key.pub"
        raise UsageError(f"the public key cannot be used: {_first_line(error)}", where=public_key, fix=fix) from error
    try:
        config.verify(path, signature)
    except Exception as error:  # whatever a stranger's bundle makes the package say, it is not signed
        raise IntegrityError(
            f"the signature does not hold: {_first_line(error)}",
            where=signature,
            fix="do not use the artifact before you know who changed it",
        ) from error


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise RuntimeMissing(
            f"signatures need the package model-signing: {error}", fix="pip install 'llmx[sign]'"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
