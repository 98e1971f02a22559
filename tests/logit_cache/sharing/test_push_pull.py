"""The commands push and pull: both sides of a transfer between labs, with cards, signatures, and text left out."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.caches import known
from support.caches.billion import Linked, write_receipt
from support.caches.copies import pull, push
from support.caches.small import dense_targets, make_corpus, make_entry, make_entry_2, write_entry
from support.commands import Run, command, environment, refused, succeeded
from support.processes import start
from support.servers.s3 import Bucket
from support.signing_keys import Keys, write_key

from storage import LogitCache
from storage.cache.verify import verify
from storage.cache.writer import EntryWriter
from storage.errors import CacheNotFound, CorruptCache, InputError
from storage.format.sealing import digest
from storage.stores.local import LocalStore


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return write_key(tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def labelled(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of real text with made-up targets."""
    path = Path(shutil.copytree(small_cache, tmp_path_factory.mktemp("labelled") / "cache"))
    cache = LogitCache.open(str(path))
    size, vocabulary = cache.record.corpus.positions, cache.vocabulary_size
    labels = np.append(cache.tokens.read(1, size).astype(np.int64), -1)
    logits = np.random.default_rng(0).normal(size=(size, vocabulary))
    write_entry(path, "made-up", make_entry(cache.record, 4, shard_tokens=4096), dense_targets(logits, 4, labels))
    return path


def arrays(path: Path) -> dict[str, bytes]:
    """All files that receipts cover, and the metadata that implies them."""
    return {key: data for key, data in known.contents(path).items() if key not in ("README.md", "model.sig")}


# --- commands --------------------------------------------------------------------------------------------------------


def test_push_and_pull(source: Path, run: Run, tmp_path: Path) -> None:
    shared, back = tmp_path / "shared", tmp_path / "back"
    done = succeeded(run("logit-cache", "push", source, shared, "--license", "cc-by-4.0"))
    assert "a, b, v2, with tokens" in done.stdout
    assert " 0 were there" in done.stdout
    assert "kB (100 %)" in done.stderr
    assert (shared / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n")
    done = succeeded(run("logit-cache", "pull", shared, back, "--teacher", "b", "--json"))
    found = json.loads(done.stdout)
    assert (found["teachers"], found["tokens_included"], found["missing"]) == (["b"], True, {})
    succeeded(run("logit-cache", "pull", shared, back))
    assert arrays(back) == arrays(source)
    assert (back / "README.md").read_bytes() == (shared / "README.md").read_bytes()
    done = run("logit-cache", "verify", back, "--deep", "--json")
    assert (done.returncode, json.loads(done.stdout)["leftovers"]) == (0, [])


def test_an_incomplete_entry_is_reported(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "source"
    record = known.write_stream(source)
    writer = known.EntryWriter.open(str(source), "a", known.entries(record)["a"])
    writer.commit(1, known.rows(writer.entry, 1))
    done = succeeded(run("logit-cache", "push", source, tmp_path / "shared"))
    assert "not complete at the source: teachers/a lacks 2 ranges, the first 0..32" in done.stdout


@pytest.mark.parametrize("name", ["push", "pull"])
def test_errors_are_one_line(source: Path, name: str, run: Run, tmp_path: Path) -> None:
    refused(run("logit-cache", name, tmp_path / "nothing", tmp_path / "target"), "no cache there")
    refused(run("logit-cache", name, source, source), "same location")
    refused(run("logit-cache", name, source, tmp_path / "target", "--teacher", "c"), "there is: a, b")
    assert not (tmp_path / "target").exists()
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_after_a_failure_it_reports_where_it_resumes(source: Path, run: Run, tmp_path: Path) -> None:
    path = source / "teachers/b/entropy/c/0"
    original = path.read_bytes()
    path.write_bytes(original[:-1])
    done = run("logit-cache", "pull", source, tmp_path / "target")
    refused(done, "teachers/b/entropy/c/0")
    assert f"{tmp_path}/target.incoming; run the same command to resume" in done.stderr
    path.write_bytes(original)
    assert run("logit-cache", "pull", source, tmp_path / "target").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.soak)])
def test_killed_commands_resume(kills: int, tmp_path: Path) -> None:
    """Kills push and pull after any number of files, of a cache with objects large enough to be killed within one."""
    source, target = tmp_path / "source", tmp_path / "target"
    large_cache(source)
    chance = random.Random(kills)
    expected = arrays(source)
    killed = 0
    for attempt in range(10 * kills):
        files = len(staged(target)) + chance.randint(1, 30)
        process = start("logit-cache", "push" if attempt % 2 else "pull", source, target)
        while process.poll() is None and len(staged(target)) < files:
            time.sleep(0.0005)
        process.kill()
        killed += process.wait() != 0
        if target.exists():
            assert arrays(target) == expected, "it has its name, so it is whole"
            shutil.rmtree(target)
        if killed == kills:
            break
    assert killed == kills
    assert pull(str(source), str(target)).missing == {}
    assert arrays(target) == expected
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def staged(target: Path) -> list[str]:
    """Files of a copy that does not have its name yet; folders may go meanwhile."""
    return [name for _, _, names in os.walk(target.with_suffix(".incoming")) for name in names]


def large_cache(path: Path, shards: int = 24) -> None:
    """An entry whose shards are one encoded shard many times over, in about 30 MB."""
    rng, size = np.random.default_rng(0), 8192
    record = make_corpus(str(path), rng.integers(0, 16_000, size * shards).astype(np.uint16), 16_000)
    EntryWriter.open(str(path), "a", make_entry(record, 64, shard_tokens=size))
    receipts = LogitCache.open(str(path)).teacher("a").receipts
    arrays = {}
    for name, spec in receipts.specs.items():
        shape = (size, *spec.shape[1:])
        values = rng.normal(size=shape) if spec.dtype == "float32" else rng.integers(0, 16_000, shape)
        arrays[name] = Linked(path / "teachers/a", spec), values.astype(spec.dtype)
    for shard in range(shards):
        objects = {name: linked.put(shard, 0, values) for name, (linked, values) in arrays.items()}
        write_receipt(receipts, path, shard, objects, None)
    receipts.write_index()


# --- cards -----------------------------------------------------------------------------------------------------------


def test_the_card_follows_the_cache_and_keeps_its_licence(source: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    push(str(source), str(shared), teachers=["a"], license="odc-by")
    assert "### b" not in (shared / "README.md").read_text()
    push(str(source), str(shared))
    card = (shared / "README.md").read_text()
    assert "### a" in card
    assert "### b" in card
    assert card.startswith("---\nlicense: odc-by\n")
    logged: list[str] = []
    (shared / "README.md").write_text("our own words")
    push(str(source), str(shared), license="mit", log=logged.append)
    assert (shared / "README.md").read_text() == "our own words"
    assert "README.md was not written by push" in logged[0]


def test_a_page_too_long_to_be_a_card_is_not_copied(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_bytes(b"x" * (2 << 20))
    logged: list[str] = []
    pull(str(source), str(tmp_path / "target"), log=logged.append)
    assert not (tmp_path / "target/README.md").exists()
    assert "README.md" in logged[0]


# --- signatures ------------------------------------------------------------------------------------------------------


def test_signed_and_verified(source: Path, keys: Keys, run: Run, tmp_path: Path) -> None:
    private, public = keys
    shared = tmp_path / "shared"
    succeeded(run("logit-cache", "push", source, shared, "--sign", private))
    succeeded(run("logit-cache", "pull", shared, tmp_path / "all", "--verify-key", public))
    # The pulled cache still carries the signature: it can be pulled from again.
    pull(str(tmp_path / "all"), str(tmp_path / "one"), teachers=["b"], verify_key=str(public))
    pull(str(tmp_path / "one"), str(tmp_path / "again"), verify_key=str(public))
    assert LogitCache.open(str(tmp_path / "again")).teachers == ("b",)
    refused(run("logit-cache", "pull", source, tmp_path / "target", "--verify-key", public), "model.sig", "missing")
    other = write_key(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    refused(run("logit-cache", "pull", shared, tmp_path / "target", "--verify-key", other[1]), "model.sig")
    assert not (tmp_path / "target").exists()
    assert not (tmp_path / "target.incoming").exists()


def test_a_grown_cache_is_signed_again(source: Path, keys: Keys, tmp_path: Path) -> None:
    private, public = map(str, keys)
    shared, logged = tmp_path / "shared", []
    push(str(source), str(shared), teachers=["a"], sign=private)
    push(str(source), str(shared), log=logged.append)
    assert "model.sig signs the cache before this push" in logged[0]
    with pytest.raises(CorruptCache, match=r"teachers/b/.* not among the signed files"):
        pull(str(shared), str(tmp_path / "target"), verify_key=public)
    push(str(source), str(shared), sign=private)
    pull(str(shared), str(tmp_path / "target"), verify_key=public)
    assert arrays(tmp_path / "target") == arrays(source)


def test_a_cache_that_is_there_takes_nothing_unsigned(source: Path, keys: Keys, tmp_path: Path) -> None:
    private, public = map(str, keys)
    shared, target = tmp_path / "shared", tmp_path / "target"
    push(str(source), str(shared), teachers=["a"], sign=private)
    pull(str(shared), str(target), verify_key=public)
    push(str(source), str(shared))
    with pytest.raises(CorruptCache, match=r"teachers/b/.* not among the signed files"):
        pull(str(shared), str(target), verify_key=public)
    assert LogitCache.open(str(target)).teachers == ("a",)


@pytest.mark.parametrize(
    "key", ["zarr.json", "teachers/a/zarr.json", "teachers/a/receipts/00000001.json", "receipts/tokens/index.json"]
)
def test_the_copied_bytes_are_the_verified_ones(
    source: Path, keys: Keys, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that serves signed records at the first read and others later."""
    private, public = map(str, keys)
    shared, target = tmp_path / "shared", tmp_path / "target"
    push(str(source), str(shared), sign=private)
    original, looks = (shared / key).read_bytes(), []
    read = LocalStore.read

    def second_face(self: LocalStore, name: str, *limit: int) -> bytes:
        data = read(self, name, *limit)
        if name == key and str(shared) in self.url and str(target) not in self.url:
            looks.append(name)
            # The root record is read once before anything is fetched.
            if len(looks) > 2:
                return data.replace(b" ", b"  ")
        return data

    monkeypatch.setattr(LocalStore, "read", second_face)
    pull(str(shared), str(target), verify_key=public)
    assert (target / key).read_bytes() == original
    assert len(looks) <= 2


def test_the_pulled_entry_alone_is_verified_against_its_signature_with_another_corpus(
    source: Path, keys: Keys, tmp_path: Path
) -> None:
    private, public = map(str, keys)
    shared, text = tmp_path / "shared", tmp_path / "text"
    push(str(source), str(shared), without_tokens=True, sign=private)
    known.write_stream(text)
    pull(str(shared), str(tmp_path / "target"), corpus=str(text), verify_key=public)
    assert LogitCache.open(str(tmp_path / "target")).tokens.read(0, 4).tolist() == known.stream()[0][:4].tolist()
    path = shared / "teachers/a/receipts/00000001.json"
    path.write_bytes(path.read_bytes().replace(b" ", b"  "))
    with pytest.raises(CorruptCache, match=str(path)):
        pull(str(shared), str(tmp_path / "other"), corpus=str(text), verify_key=public)


# --- without tokens --------------------------------------------------------------------------------------------------


def test_targets_without_their_text(source: Path, tmp_path: Path) -> None:
    logged: list[str] = []
    shared = tmp_path / "shared"
    # No log-probs of labels, and their sums in its receipts all the same.
    write_entry(source, "lean", make_entry_2(LogitCache.open(str(source)).record, known.K), known.targets())
    done = push(str(source), str(shared), without_tokens=True, log=logged.append)
    assert not done.tokens_included
    assert "54 %" in logged[0]
    files = known.contents(shared)
    assert not [key for key in files if key.startswith(("tokens", "document_starts", "loss_mask", "receipts/t/"))]
    assert not [key for key in files if "label_" in key]
    assert sorted(key for key in files if key.startswith("receipts/")) == ["receipts/tokenizer.json"]
    found = verify(str(shared), deep=True)
    assert (found.problems, found.leftovers, found.missing) == ([], [], {})
    cache, original = LogitCache.open(str(shared)), LogitCache.open(str(source))
    with pytest.raises(CacheNotFound, match="without its tokens"):
        _ = cache.tokens
    for name in ("a", "b", "lean", "v2"):
        here, there = cache.teacher(name), original.teacher(name)
        assert here.entry.derived_from == digest(there.entry)
        assert not here.entry.targets.has("label")
        read, truth = here.read(0, known.N), there.read(0, known.N)
        assert read.label_logprob is None
        assert np.array_equal(read.token_ids, truth.token_ids)
        assert np.array_equal(read.logprobs, truth.logprobs)
        statistics, expected = here.statistics()[0], there.statistics()[0]
        assert statistics is not None
        assert expected is not None
        assert (statistics.labelled, statistics.label_nats) == (0, 0.0)
        assert statistics.head_mass == expected.head_mass
        for key, data in known.contents(source).items():
            if key.startswith(f"teachers/{name}/") and "/c/" in key and "label_" not in key:
                assert files[key] == data, key
    again = push(str(source), str(shared), without_tokens=True)
    assert again.copied == 0
    onwards = push(str(shared), str(tmp_path / "onwards"), without_tokens=True)
    assert onwards.kept == 0
    assert arrays(tmp_path / "onwards") == arrays(shared), "nothing is taken away twice"
    push(str(source), str(tmp_path / "whole"))
    with pytest.raises(InputError, match="it has the tokens"):
        push(str(source), str(tmp_path / "whole"), without_tokens=True)


def test_commands_on_a_cache_without_tokens(source: Path, run: Run, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    done = succeeded(run("logit-cache", "push", source, shared, "--without-tokens"))
    assert "warning: targets reveal text" in done.stderr
    done = succeeded(run("logit-cache", "inspect", shared))
    assert "shared without its tokens" in done.stdout
    refused(run("logit-cache", "inspect", shared, "--at", 3), "without its tokens")


def test_the_text_is_attached_again_on_the_other_side(
    labelled: Path, text_file: Path, run: Run, tmp_path: Path
) -> None:
    shared, got, text, target = (tmp_path / name for name in ("shared", "got", "text", "target"))
    for arguments in (
        ("push", labelled, shared, "--without-tokens"),
        ("pull", shared, got),
        ("tokenize", "--text", text_file, "--tokenizer", got / "tokenizer", "--out", text),
        ("pull", shared, target, "--corpus", text),
    ):
        succeeded(run("logit-cache", *arguments))
    found = verify(str(target), deep=True)
    assert (found.problems, found.leftovers, found.missing) == ([], [], {})
    cache, original = LogitCache.open(str(target)), LogitCache.open(str(labelled))
    size = original.record.corpus.positions
    assert np.array_equal(cache.tokens.read(0, size), original.tokens.read(0, size))
    assert np.array_equal(
        cache.teacher("made-up").read(0, size).token_ids, original.teacher("made-up").read(0, size).token_ids
    )
    # Pulling into the cache that has the text gives the same.
    succeeded(run("logit-cache", "pull", shared, text))
    assert arrays(text) == arrays(target)


def test_another_text_is_not_attached(source: Path, run: Run, tmp_path: Path) -> None:
    shared, text = tmp_path / "shared", tmp_path / "text"
    push(str(source), str(shared), without_tokens=True)
    tokens, mask = known.stream()
    tokens = tokens.copy()
    tokens[77] = (tokens[77] + 1) % known.V
    make_corpus(str(text), tokens, known.V, known.STARTS, mask, known.TOKENIZER_FILES)
    refused(run("logit-cache", "pull", shared, tmp_path / "target", "--corpus", text), "stream_sha256", "same text")
    assert not (tmp_path / "target").exists()
    with pytest.raises(InputError, match="no tokens to attach"):
        pull(str(shared), str(tmp_path / "target"), corpus=str(shared))


def test_a_corpus_that_lies_about_its_tokens_is_not_attached(source: Path, tmp_path: Path) -> None:
    """The digest is computed from the tokens, whatever the record states."""
    shared, text = tmp_path / "shared", tmp_path / "text"
    push(str(source), str(shared), without_tokens=True)
    known.write_stream(text)
    path = text / "zarr.json"
    honest = LogitCache.open(str(text)).record
    other = honest.model_copy(update={"corpus": honest.corpus.model_copy(update={"stream_sha256": "e" * 64})})
    root = path.read_text().replace(honest.corpus.stream_sha256, "e" * 64)
    path.write_text(root.replace(digest(honest), digest(other)))
    for receipt in (text / "receipts").rglob("*.json"):
        if receipt.name != "tokenizer.json":
            data = json.loads(receipt.read_text())
            data.pop("sha256")
            data["record_sha256"] = digest(other)
            reseal(receipt, data)
    for name in ("tokens", "document_starts", "loss_mask"):
        folder = text / "receipts" / name
        index = json.loads((folder / "index.json").read_text())
        index.pop("sha256")
        shards = sorted(path for path in folder.glob("0*.json"))
        index["receipts"] = [json.loads(path.read_text())["sha256"] for path in shards]
        reseal(folder / "index.json", index)
    assert LogitCache.open(str(text)).tokens.read(0, 2).shape == (2,)
    with pytest.raises(CorruptCache, match="not the one in its record"):
        pull(str(shared), str(tmp_path / "target"), corpus=str(text))


def reseal(path: Path, body: dict[str, Any]) -> None:
    import hashlib

    from storage.format.sealing import canonical_json

    path.write_text(json.dumps({**body, "sha256": hashlib.sha256(canonical_json(body)).hexdigest()}))


# --- object stores ---------------------------------------------------------------------------------------------------


def test_through_an_object_store(moto_bucket: Bucket, source: Path, keys: Keys, run: Run, tmp_path: Path) -> None:
    private, public = keys
    url = f"{moto_bucket.url}/shared"
    succeeded(run("logit-cache", "push", source, url, "--teacher", "a"))
    push(str(source), url, sign=str(private))
    there = moto_bucket.objects("shared/")
    assert {key: data for key, data in there.items() if key not in ("README.md", "model.sig")} == arrays(source)
    succeeded(run("logit-cache", "pull", url, tmp_path / "back", "--verify-key", public))
    assert arrays(tmp_path / "back") == arrays(source)
    pull(url, f"{moto_bucket.url}/copy")
    assert moto_bucket.objects("copy/") == there


def test_a_killed_push_to_an_object_store_resumes(moto_bucket: Bucket, run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    large_cache(source, shards=6)
    url = f"{moto_bucket.url}/shared"
    process = subprocess.Popen(
        command("logit-cache", "push", source, url, "--workers", 1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**environment(), "TMPDIR": str(tmp_path)},
    )
    while process.poll() is None:
        if moto_bucket.keys("shared/teachers/a/receipts/"):
            break
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    refused(run("logit-cache", "inspect", url), "no cache there")
    done = succeeded(run("logit-cache", "push", source, url, "--json"))
    assert json.loads(done.stdout)["kept"] >= 9, "objects with a receipt are not sent again"
    there = moto_bucket.objects("shared/")
    assert {key: data for key, data in there.items() if key != "README.md"} == arrays(source)


def test_the_hub_is_pushed_to_and_from_a_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="logit-cache push"):
        pull(str(source), "hf://datasets/lab/name")
    with pytest.raises(InputError, match="a whole data set"):
        push(str(source), "hf://datasets/lab/name/below")
    with pytest.raises(InputError, match="pull it into a local folder first"):
        push(f"memory://{tmp_path.name}/x", "hf://datasets/lab/name")
    assert os.listdir(tmp_path) == ["source"]
