"""Signing a cache: one signature, in the OpenSSF model-signing format, of the files that determine all others.

The signed files are the *manifest*: the records (`zarr.json` of the root, of `teachers` and of every entry), the
receipts with their indexes, and the fidelity reports. A receipt holds the sha256 of every object that it commits, and
everything else in a cache follows from the records; so a verified signature and `logit-cache verify --deep` together
cover every byte, and the signature alone is checked without reading the arrays. Not covered: the card (README.md),
which is for people only.

The signature is the object `model.sig` at the root: a Sigstore bundle that lists each file with its sha256, signed with
an elliptic-curve key (P-256, P-384 or P-521) in a PEM file. No network is used. The command line tool of the
model-signing package also verifies it, on a whole copy:
``model_signing verify key CACHE --signature CACHE/model.sig --public_key PUB.pem --ignore_unsigned_files``.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from storage.cache.inventory import SIGNATURE_KEY
from storage.errors import CorruptCache, InputError, error_text
from storage.format.manifest.shared import TEACHER_NAME

# Enough for some 65,000 files. Data read before it is verified stays small.
MAX_SIGNATURE_BYTES = 16 << 20

_MANIFEST = re.compile(
    rf"(?:teachers/{TEACHER_NAME}/)?(?:zarr\.json|receipts/.+\.json)|teachers/zarr\.json"
    rf"|teachers/{TEACHER_NAME}/fidelity\.json"
)
_ENTRY = re.compile(rf"teachers/{TEACHER_NAME}/")


def manifest_keys(keys: Iterable[str]) -> list[str]:
    """The keys among a cache's keys that a signature covers, sorted."""
    return sorted(key for key in keys if _MANIFEST.fullmatch(key))


def sign(folder: Path, keys: Iterable[str], private_key: Path) -> bytes:
    """Sign the manifest files among `keys`, which are paths below a folder; returns the bytes of `model.sig`.

    Raises InputError without the package, for a key that cannot sign, and for more files than a signature can list.
    """
    _require_package()
    from model_signing import hashing, signing

    listed = [folder / key for key in manifest_keys(keys)]

    class Listed(hashing.Config):
        """Hashes the files of the manifest, and no other file of the folder."""

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            return super().hash(model_path, files_to_hash=listed)

    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise InputError(
            f"{private_key}: cannot sign with it ({error_text(error)}); expected an elliptic-curve private key without "
            f"a password: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
        ) from None
    hasher = Listed().set_ignored_paths(paths=(), ignore_git_paths=False)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / SIGNATURE_KEY
        config.set_hashing_config(hasher).sign(folder, path)
        signature = path.read_bytes()
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise InputError(
            f"the signature of {len(listed)} files takes {len(signature)} bytes, at most {MAX_SIGNATURE_BYTES} are "
            f"read: share the teachers in several caches, or make shards larger"
        )
    return signature


def verify_signature(
    folder: Path, keys: Iterable[str], signature: bytes, public_key: Path, where: Callable[[str], str] = str
) -> None:
    """Check that the manifest files among `keys`, which are paths below a folder, are those that a key's owner signed.

    Every one of them must be in the signed list with the same sha256, and no signed file may be missing, except for
    teacher entries that are missing entirely: a cache with one of two signed entries passes. `where` maps a key to
    its address, for messages.

    Raises InputError without the package and for an unusable public key, CorruptCache with the file at fault otherwise.
    """
    signed = _signed_files(signature, public_key, where(SIGNATURE_KEY))
    here = manifest_keys(keys)
    for key in here:
        if key not in signed:
            raise CorruptCache(f"{where(key)}: in the cache, and not among the signed files")
        found = hashlib.sha256((folder / key).read_bytes()).hexdigest()
        if found != signed[key]:
            raise CorruptCache(f"{where(key)}: expected the sha256 {signed[key]} that was signed, found {found}")
    parts = {_part(key) for key in here}
    for key in sorted(set(manifest_keys(signed)) - set(here)):
        if not _part(key) or _part(key) in parts:
            raise CorruptCache(f"{where(key)}: signed, and missing in the cache")


def _part(key: str) -> str:
    """The part that may be missing only as a whole: a teacher's folder, or "" for files that every cache has."""
    match = _ENTRY.match(key)
    return match[0] if match else ""


def _signed_files(signature: bytes, public_key: Path, where: str) -> dict[str, str]:
    """sha256 of every signed file by its key, once the signature (from `where`) has been verified."""
    _require_package()
    # The package's public call compares a whole folder with the list; a pulled cache can be a part of it. This is the
    # step below that call: it verifies the signature, and only then parses the signed statement.
    from model_signing._signing import sign_ec_key, sign_sigstore_pb

    try:
        verifier = sign_ec_key.Verifier(public_key)
    except Exception as error:
        raise InputError(
            f"{public_key}: cannot verify with it ({error_text(error)}); expected an elliptic-curve public key: "
            f"openssl ec -in KEY.pem -pubout -out PUB.pem"
        ) from None
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / SIGNATURE_KEY
            path.write_bytes(signature)
            signed = verifier.verify(sign_sigstore_pb.Signature.read(path))
    except Exception as error:
        # Any error of the parsers on a hostile bundle means the same.
        raise CorruptCache(f"{where}: no signature by the key {public_key} ({error_text(error)})") from None
    return {
        item.identifier: item.digest.digest_hex
        for item in signed.resource_descriptors()
        if item.digest.algorithm == "sha256"
    }


def _require_package() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError:
        raise InputError("signatures need a package that is not installed: pip install 'logit-cache[sign]'") from None
