"""push and pull: copying a cache together with its card files, README.md and the signature.

The copying itself is `storage.transfer.copy`. The two directions differ here: a push describes the cache in README.md
and may sign it; a pull may require a signature, and verifies it over the records and receipts that it has fetched,
before any data is copied. A data set of the hub is written by the hub's own uploader, from a folder of links.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

from storage.cache.inventory import CARD_KEY, SIGNATURE_KEY
from storage.cache.reader import LogitCache
from storage.errors import CorruptCache, InputError, StoreNotFound
from storage.files import local_path
from storage.progress import Log, Track, silent, untracked
from storage.stores import open_store
from storage.stores.base import Store
from storage.stores.local import LocalStore
from storage.transfer.compatibility import check_overwrites
from storage.transfer.contents import gather_whole
from storage.transfer.copy import CopyJob, Delivery, Transfer, prepare

# A card is text for people; a larger file is not a card.
_MOST_CARD_BYTES = 1 << 20
_MARK = "<!-- Written by logit-cache push, which replaces this page as long as this line is in it. -->"
_HUB = "hf://"


def push(
    job: CopyJob, *, license: str | None = None, sign: str | None = None, track: Track = untracked, log: Log = silent
) -> Delivery:
    """Copy a cache, or some of its entries, to a store from which others pull it.

    Writes README.md, the card, with `license`, and model.sig when `sign` is the path of a private key. `track` shows
    progress; `log` takes warnings and notes for the user. Raises the errors of `storage.transfer.copy.prepare`, and of
    `hub.push_to_hub` for `hf://` targets.
    """
    if job.without_tokens:
        log(
            "warning: targets reveal text: in a sample, the most probable id alone was the next token at 19 % of the "
            "positions (54 % with label_logprob, which is left out). A cache shared without tokens is not anonymous"
        )
    if job.target.startswith(_HUB):
        return _push_to_hub(job, license, sign, track, log)
    with prepare(job) as transfer:
        new = transfer.existing is None
        card_files = _new_card_files(transfer.contents.manifest, license, sign) if new else {}
        done = _deliver(transfer, "push", card_files, track, log)
    if not new:
        _update_card_files(job, license, sign, log)
    return done


def pull(job: CopyJob, *, verify_key: str | None = None, track: Track = untracked, log: Log = silent) -> Delivery:
    """Copy a cache that others made, or some of its entries, checking all of it.

    `verify_key` is the path of a public key: a cache that this key has not signed raises CorruptCache. Raises the
    errors of `storage.transfer.copy.prepare` too.
    """
    if job.target.startswith(_HUB):
        raise InputError(f"{job.target}: cannot pull into a data set of the hub; write it with logit-cache push")
    with prepare(job) as transfer:
        if verify_key is not None:
            _check_signature(transfer, local_path(verify_key))
        copied = transfer.existing is None and job.corpus is None
        card_files = _card_files_of(transfer.source.snapshot.source, log) if copied else {}
        done = _deliver(transfer, "pull", card_files, track, log)
    if not done.tokens_included and done.teachers:
        log(
            "note: this cache was shared without its tokens; to train on it, tokenize the same text with its tokenizer "
            "and pull again with --corpus"
        )
    return done


def _deliver(transfer: Transfer, name: str, card_files: dict[str, bytes], track: Track, log: Log) -> Delivery:
    try:
        with track(name, transfer.contents.size, "bytes") as advance:
            return transfer.deliver(advance, card_files)
    except BaseException:
        kept_at = transfer.destination.kept_at
        if kept_at is not None:
            log(f"the objects copied and checked so far are in {kept_at}; run the same command to resume")
        raise


def _push_to_hub(job: CopyJob, license: str | None, sign: str | None, track: Track, log: Log) -> Delivery:
    from logit_cache.sharing.hub import parse_hub_url, push_to_hub

    parse_hub_url(job.target)
    folder = open_store(job.source).local_path
    if folder is None:
        raise InputError(f"{job.source}: pull it into a local folder first; the hub's uploader reads local files")
    # Beside the source where that can be written, so that its objects are linked instead of copied.
    beside = folder.parent if os.access(folder.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".outgoing", dir=beside) as outgoing:
        staged = Path(outgoing) / "cache"
        with prepare(job.model_copy(update={"target": str(staged), "link": True})) as transfer:
            with contextlib.suppress(StoreNotFound):  # made by the push
                check_overwrites(open_store(job.target), transfer.contents)
            card_files = _new_card_files(transfer.contents.manifest, license, sign)
            done = _deliver(transfer, "check", card_files, track, log)
        with track("upload", done.copied_bytes, "bytes") as advance:
            push_to_hub(staged, job.target, advance)
    done.url = job.target
    return done


def _new_card_files(manifest: LocalStore, license: str | None, sign: str | None) -> dict[str, bytes]:
    from logit_cache.sharing.card import card_text

    folder = manifest.local_path
    found = {CARD_KEY: f"{card_text(LogitCache.open(str(folder)), license=license)}\n{_MARK}\n".encode()}
    if sign is not None:
        from logit_cache.sharing import signing

        found[SIGNATURE_KEY] = signing.sign(folder, manifest.walk(), Path(sign))
    return found


def _update_card_files(job: CopyJob, license: str | None, sign: str | None, log: Log) -> None:
    """Rewrite card and signature of a cache that has grown, from all of its records and receipts."""
    target = open_store(job.target)
    try:
        card: str | None = target.read(CARD_KEY, _MOST_CARD_BYTES).decode(errors="replace")
    except FileNotFoundError:
        card = None
    with tempfile.TemporaryDirectory() as folder:
        contents = gather_whole(target, Path(folder), job.workers)
        found = _new_card_files(contents.manifest, license or _license_in(card), sign)
    if card is not None and _MARK not in card:
        log(f"note: {target.where(CARD_KEY)} was not written by push, and is not replaced")
        del found[CARD_KEY]
    for key, data in found.items():
        target.replace(key, data)
    if sign is None and target.size(SIGNATURE_KEY) is not None:
        log(f"warning: {target.where(SIGNATURE_KEY)} signs the cache before this push: push with --sign to renew it")


def _license_in(card: str | None) -> str | None:
    """The licence of an earlier push, from the card that it wrote."""
    found = re.search(r"^license: ([a-z0-9.+-]+)$", card or "", re.MULTILINE)
    return found[1] if found and found[1] != "unknown" else None


def _check_signature(transfer: Transfer, public_key: Path) -> None:
    from logit_cache.sharing import signing

    source = transfer.source.snapshot.source
    try:
        signature = source.read(SIGNATURE_KEY, signing.MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        raise CorruptCache(f"{source.where(SIGNATURE_KEY)}: missing; this cache is not signed") from None
    folder = transfer.signed_folder()
    signing.verify_signature(folder, LocalStore(folder).walk(), signature, public_key, where=source.where)


def _card_files_of(source: Store, log: Log) -> dict[str, bytes]:
    """The source's card and signature, to copy unchecked; only `--verify-key` verifies the signature."""
    from logit_cache.sharing.signing import MAX_SIGNATURE_BYTES

    found = {}
    for key, most in ((CARD_KEY, _MOST_CARD_BYTES), (SIGNATURE_KEY, MAX_SIGNATURE_BYTES)):
        try:
            found[key] = source.read(key, most)
        except FileNotFoundError:
            continue
        except CorruptCache as error:
            log(f"note: not copied: {error}")
    return found
