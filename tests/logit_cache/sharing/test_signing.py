"""A signature covers every byte of a cache: each change is detected by the signature or by `verify`."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.commands import command, succeeded
from support.jobs import files
from support.signing_keys import Keys, write_key

from logit_cache.sharing.signing import manifest_keys, sign, verify_signature
from storage.cache.verify import verify
from storage.errors import CorruptCache, InputError

V, N, K = 61, 300, 4


def make_cache(path: Path, seed: int, entries: tuple[str, ...] = ("a", "b"), shards: int = 5) -> Path:
    rng = np.random.default_rng(seed)
    tokens = np.arange(N).astype(np.uint16) % V
    record = make_corpus(str(path), tokens, V)
    labels = np.append(tokens[1:], -1).astype(np.int64)
    for name in entries:
        entry = make_entry(record, K, shard_tokens=64, chunk_tokens=32)
        targets = dense_targets(rng.normal(size=(N, V)) * 3, K, labels)
        write_entry(path, name, entry, targets, missing=range(shards, 5))
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return write_key(tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A cache of two entries, signed; `b` is not complete."""
    path = make_cache(tmp_path_factory.mktemp("signed") / "cache", 1, ("a",))
    shutil.copytree(
        make_cache(tmp_path_factory.mktemp("other") / "c", 2, ("b",), shards=3) / "teachers/b", path / "teachers/b"
    )
    (path / "README.md").write_text("a card")
    (path / "model.sig").write_bytes(sign(path, files(path), keys[0]))
    return path


@pytest.fixture
def cache(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "cache"))


def check(path: Path, keys: Keys) -> None:
    verify_signature(path, files(path), (path / "model.sig").read_bytes(), keys[1])


def found_out(path: Path, keys: Keys) -> bool:
    """Whether a pull that checks the signature and every byte would refuse the cache."""
    try:
        check(path, keys)
    except CorruptCache:
        return True
    return not verify(str(path), deep=True).sound


def test_the_manifest_determines_the_rest(signed: Path) -> None:
    assert manifest_keys(files(signed)) == [
        "receipts/document_starts/00000000.json",
        "receipts/document_starts/index.json",
        "receipts/tokenizer.json",
        "receipts/tokens/00000000.json",
        "receipts/tokens/index.json",
        *[f"teachers/a/receipts/{shard:08d}.json" for shard in range(5)],
        "teachers/a/receipts/index.json",
        "teachers/a/zarr.json",
        *[f"teachers/b/receipts/{shard:08d}.json" for shard in range(3)],
        "teachers/b/zarr.json",
        "teachers/zarr.json",
        "zarr.json",
    ]


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_a_signed_cache_passes(cache: Path, tmp_path: Path, curve: Callable[[], ec.EllipticCurve]) -> None:
    keys = write_key(tmp_path / "keys", ec.generate_private_key(curve()))
    (cache / "model.sig").write_bytes(sign(cache, files(cache), keys[0]))
    check(cache, keys)
    assert verify(str(cache), deep=True).sound


def test_every_flipped_byte_is_found_out(cache: Path, keys: Keys) -> None:
    """One bit at a random position of each file but the card and the signature; detected by either check."""
    rng = np.random.default_rng(3)
    silent = []
    for key in files(cache):
        if key in ("README.md", "model.sig") or re.search(r"/c/[013]", key):
            continue  # and of most arrays two shards are enough
        original = (cache / key).read_bytes()
        data = bytearray(original)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        (cache / key).write_bytes(bytes(data))
        if not found_out(cache, keys):
            silent.append((key, bytes(data), original))
        (cache / key).write_bytes(original)
    # Only white space of an array's zarr.json may pass, as that file is compared by value.
    for key, changed, original in silent:
        assert re.fullmatch(r"(teachers/\w+/)?\w+/zarr\.json", key), key
        assert json.loads(changed) == json.loads(original), key


@pytest.mark.parametrize(
    "key", ["teachers/a/receipts/00000002.json", "teachers/a/zarr.json", "receipts/tokenizer.json"]
)
def test_white_space_in_a_signed_file_is_found_out(cache: Path, keys: Keys, key: str) -> None:
    (cache / key).write_bytes((cache / key).read_bytes() + b" ")
    with pytest.raises(CorruptCache, match=f"^{key}: expected the sha256 [0-9a-f]+ that was signed, found"):
        check(cache, keys)


def test_a_sound_cache_of_somebody_else_is_found_out(cache: Path, keys: Keys, tmp_path: Path) -> None:
    """Other targets with receipts and an index that fit them: only the signature detects them."""
    other = make_cache(tmp_path / "other", 99, ("a",))
    shutil.rmtree(cache / "teachers/a")
    shutil.copytree(other / "teachers/a", cache / "teachers/a")
    assert verify(str(cache), deep=True).sound
    with pytest.raises(CorruptCache, match=r"teachers/a/receipts/00000000\.json: expected the sha256"):
        check(cache, keys)


@pytest.mark.parametrize(
    "key",
    [
        "teachers/a/receipts/00000003.json",
        "teachers/a/receipts/index.json",
        "teachers/b/receipts/00000001.json",
        "teachers/b/zarr.json",
        "receipts/tokens/00000000.json",
        "receipts/tokenizer.json",
        "teachers/zarr.json",
        "zarr.json",
    ],
)
def test_a_removed_file_of_the_manifest_is_found_out(cache: Path, keys: Keys, key: str) -> None:
    (cache / key).unlink()
    with pytest.raises(CorruptCache, match=f"^{key}: signed, and missing"):
        check(cache, keys)


def test_an_added_receipt_or_entry_is_found_out(cache: Path, keys: Keys, tmp_path: Path) -> None:
    added = cache / "teachers/b/receipts/00000004.json"
    added.write_bytes((cache / "teachers/a/receipts/00000004.json").read_bytes())
    with pytest.raises(CorruptCache, match=r"teachers/b/receipts/00000004\.json: in the cache, and not among the"):
        check(cache, keys)
    added.unlink()
    check(cache, keys)
    shutil.copytree(make_cache(tmp_path / "other", 7, ("evil",)) / "teachers/evil", cache / "teachers/evil")
    assert verify(str(cache), deep=True).sound
    with pytest.raises(CorruptCache, match=r"teachers/evil/receipts/00000000\.json: in the cache, and not"):
        check(cache, keys)


def test_one_of_two_signed_entries_passes(cache: Path, keys: Keys) -> None:
    shutil.rmtree(cache / "teachers/a")
    check(cache, keys)


def test_objects_need_not_be_there_to_check_the_signature(cache: Path, keys: Keys) -> None:
    """A pull checks the manifest before it fetches anything else."""
    for key in set(files(cache)) - {*manifest_keys(files(cache)), "model.sig"}:
        (cache / key).unlink()
    check(cache, keys)


def test_errors_give_the_address_of_where(cache: Path, keys: Keys) -> None:
    signature = (cache / "model.sig").read_bytes()
    (cache / "zarr.json").unlink()
    for data, named in ((signature, "zarr.json: signed, and missing"), (b"{}", "model.sig: no signature by")):
        with pytest.raises(CorruptCache, match=f"^s3://bucket/{re.escape(named)}"):
            verify_signature(cache, files(cache), data, keys[1], where=lambda key: f"s3://bucket/{key}")


def test_another_key_does_not_pass(cache: Path, tmp_path: Path) -> None:
    others = write_key(tmp_path / "keys", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(CorruptCache, match=r"model\.sig: no signature by the key"):
        check(cache, others)


def forged(signature: bytes, change: Callable[[dict[str, object]], None]) -> bytes:
    """A bundle whose statement was changed after it was signed."""
    bundle = json.loads(signature)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(bundle).encode()


def test_a_changed_statement_does_not_pass(cache: Path, keys: Keys) -> None:
    signature = (cache / "model.sig").read_bytes()
    (cache / "model.sig").write_bytes(forged(signature, lambda statement: None))
    with pytest.raises(CorruptCache, match="no signature by"):  # other white space is enough
        check(cache, keys)
    data = b"{}"
    (cache / "zarr.json").write_bytes(data)

    def change(statement: dict[str, object]) -> None:
        resources = statement["predicate"]["resources"]  # type: ignore[index]
        next(item for item in resources if item["name"] == "zarr.json")["digest"] = "0" * 64

    (cache / "model.sig").write_bytes(forged(signature, change))
    with pytest.raises(CorruptCache, match="no signature by"):
        check(cache, keys)


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"\x00\xff\xfe",
        b"{}",
        b"[]",
        b"null",
        b'{"verificationMaterial": {}}',
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "verificationMaterial": {"publicKey": {}}}',
        b"[" * 100_000,
        b'{"verificationMaterial": ' + b'{"a":' * 50_000,
    ],
    ids=range(9),
)
def test_a_malformed_signature_is_one_clear_error(cache: Path, keys: Keys, signature: bytes) -> None:
    (cache / "model.sig").write_bytes(signature)
    with pytest.raises(CorruptCache, match=r"^model\.sig: no signature by the key") as caught:
        check(cache, keys)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_cut_signature_is_an_error_and_a_flipped_bit_of_it_one_or_no_change(cache: Path, keys: Keys) -> None:
    rng = np.random.default_rng(4)
    original = (cache / "model.sig").read_bytes()
    for length in (0.1, 0.5, 0.9, 0.99):
        with pytest.raises(CorruptCache, match="no signature by"):
            verify_signature(cache, files(cache), original[: int(len(original) * length)], keys[1])
    refused = 0
    for _ in range(200):
        data = bytearray(original)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            verify_signature(cache, files(cache), bytes(data), keys[1])
        except CorruptCache:
            refused += 1
    # Nearly all of it is the signed statement; the few bytes beside it name no file and no digest.
    assert refused > 190


def test_keys_that_cannot_be_used_are_refused(cache: Path, keys: Keys, tmp_path: Path) -> None:
    signature = (cache / "model.sig").read_bytes()
    rsa_keys = write_key(tmp_path / "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    curve = write_key(tmp_path / "curve", ec.generate_private_key(ec.SECP256K1()))
    locked = write_key(tmp_path / "locked", ec.generate_private_key(ec.SECP256R1()), b"correct horse")
    nothing = tmp_path / "none.pem"
    for private in (rsa_keys[0], curve[0], locked[0], nothing, keys[1], cache):
        with pytest.raises(InputError, match="cannot sign with it") as caught:
            sign(cache, files(cache), private)
        assert str(private) in str(caught.value)
        assert "\n" not in str(caught.value)
    for public in (rsa_keys[1], curve[1], nothing, keys[0], cache):
        with pytest.raises(InputError, match="cannot verify with it"):
            verify_signature(cache, files(cache), signature, public)


def test_without_the_package_the_error_names_it(cache: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = (cache / "model.sig").read_bytes()
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(InputError, match=r"pip install 'logit-cache\[sign\]'"):
        sign(cache, files(cache), keys[0])
    with pytest.raises(InputError, match=r"pip install 'logit-cache\[sign\]'"):
        verify_signature(cache, files(cache), signature, keys[1])


def standard(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line tool of the model-signing package."""
    home = {**os.environ, "HOME": "/nonexistent"}
    return subprocess.run(
        command("model_signing", *arguments), capture_output=True, text=True, env=home, timeout=60, check=False
    )


def test_the_standard_tool_checks_it_too(cache: Path, keys: Keys) -> None:
    how = ("verify", "key", cache, "--signature", cache / "model.sig", "--public_key", keys[1])
    done = standard(*how, "--ignore_unsigned_files")
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    receipt = cache / "teachers/a/receipts/00000001.json"
    receipt.write_bytes(receipt.read_bytes().replace(b'"bytes": ', b'"bytes": 1'))
    done = standard(*how, "--ignore_unsigned_files")
    assert done.returncode != 0
    assert "teachers/a/receipts/00000001.json" in done.stderr


def test_a_signature_that_the_standard_tool_made_of_all_files_passes(cache: Path, keys: Keys) -> None:
    (cache / "model.sig").unlink()
    succeeded(standard("sign", "key", cache, "--signature", cache / "model.sig", "--private_key", keys[0]))
    check(cache, keys)
    receipt = cache / "teachers/a/receipts/00000001.json"
    receipt.write_bytes(receipt.read_bytes() + b"\n")
    with pytest.raises(CorruptCache, match=r"teachers/a/receipts/00000001\.json"):
        check(cache, keys)


def test_a_file_that_a_signer_left_out_does_not_pass(cache: Path, keys: Keys) -> None:
    """A signature may name paths that it ignores; files there are not signed."""
    (cache / "model.sig").unlink()
    succeeded(standard(
        "sign", "key", cache, "--signature", cache / "model.sig", "--private_key", keys[0],
        "--ignore-paths", cache / "teachers/b",
    ))  # fmt: skip
    with pytest.raises(CorruptCache, match=r"teachers/b/receipts/00000000\.json: in the cache, and not among the"):
        check(cache, keys)
    shutil.rmtree(cache / "teachers/b")
    check(cache, keys)
