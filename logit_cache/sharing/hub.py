"""Pushing a cache to a Hugging Face data set, through the hub's own uploader.

The uploader is huggingface_hub's `upload_folder`: it uploads in parallel, commits in batches, and resumes an
interrupted upload when it is run again. Between its commits the data set can be read, so a cache is uploaded in three
stages: objects, then the receipts that commit them, then the root record (with the signature), without which no reader
opens the cache. Reading needs none of this: `hf://datasets/…` is a URL of fsspec.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from storage.cache.inventory import ROOT_KEY, SIGNATURE_KEY
from storage.errors import CacheNotFound, InputError, StoreUnavailable, error_text

_URL = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/].*?))?/?", re.ASCII)
# Shell patterns in which * also matches slashes, as in the uploader.
_ROOT = (ROOT_KEY, SIGNATURE_KEY)
_RECEIPTS = ("receipts/*", "teachers/*/receipts/*")
# Patterns that each stage takes and leaves out, in the order of the stages.
_STAGES = ((("*",), (*_RECEIPTS, *_ROOT)), (_RECEIPTS, ()), (_ROOT, ()))


def push_to_hub(folder: Path, url: str, progress: Callable[[int], None] | None = None) -> None:
    """Upload a folder, which holds one whole cache and nothing else, to `hf://datasets/ORG/NAME[@REVISION]`.

    A data set that does not exist yet is created as private; a branch that does not exist yet is created. Files there
    that are not in the folder stay. Run again after an interruption, it sends the missing files. `progress` is called
    with the bytes of each stage that has been committed; on a terminal the uploader shows a display of its own.

    Raises InputError for another kind of URL and for a card that the hub rejects, CacheNotFound for a folder without a
    cache, StoreUnavailable when the hub refuses or does not answer. huggingface_hub finds the token (`hf auth login`,
    HF_TOKEN).
    """
    name, revision = parse_hub_url(url)
    if not (folder / ROOT_KEY).is_file():
        raise CacheNotFound(f"{folder}: no cache there (no {ROOT_KEY})")
    from huggingface_hub import HfApi

    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    api = HfApi(library_name="logit-cache")
    try:
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, repo_type="dataset", exist_ok=True)
        for take, leave in _STAGES:
            keys = [key for key in sizes if _matches(key, take) and not _matches(key, leave)]
            if keys:
                api.upload_folder(
                    repo_id=name,
                    repo_type="dataset",
                    revision=revision,
                    folder_path=folder,
                    allow_patterns=list(take),
                    ignore_patterns=list(leave),
                    commit_message=f"logit-cache push: {len(keys)} files",
                )
            if progress is not None:
                progress(sum(sizes[key] for key in keys))
    except Exception as error:
        raise _explained(error, url) from error


def parse_hub_url(url: str) -> tuple[str, str | None]:
    """`ORG/NAME` and the revision of `hf://datasets/ORG/NAME[@REVISION]`; InputError for anything else."""
    match = _URL.fullmatch(url)
    if match is None:
        raise InputError(f"{url}: on the hub a cache is a whole data set: hf://datasets/ORG/NAME[@REVISION]")
    revision = match["revision"]
    return match["name"], None if revision is None else unquote(revision)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _explained(error: Exception, url: str) -> Exception:
    """An exception of the hub or of the network as an error with its remedy."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    # The uploader wraps the error of a request in one that names only the file.
    reason = ": ".join(error_text(item, 300) for item in dict.fromkeys(chain[:2]))
    statuses = {getattr(getattr(item, "response", None), "status_code", None) for item in chain}
    if statuses & {401, 403}:
        return StoreUnavailable(
            f"{url}: the hub refused ({reason}); log in with `hf auth login` or set HF_TOKEN, with a token that may "
            f"write to this data set"
        )
    if isinstance(error, ValueError):
        return InputError(f"{url}: {reason}")
    return StoreUnavailable(f"{url}: not everything was uploaded ({reason}); run the command again to resume")
