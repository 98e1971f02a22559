"""The folder of a training run: its identity, its checkpoints, and the publication of the finished model.

::

    run.json          the run's identity; written before the first step
    logit-cache.lock  held by the process that trains
    checkpoint-<n>/   transformers' checkpoints, while it runs
    report.json       written last: the run is finished
    config.json, model.safetensors, tokenizer.json, …    the model, renamed into the folder, config.json last;
                      of an adapter adapter_model.safetensors, …, adapter_config.json last

A folder without either is no model to any library, so a run that stops early never looks like a finished one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from storage.errors import IdentityMismatch, InputError, StorageFull, is_out_of_space
from storage.files import PARTIAL, check_writable, local_path, replace_file
from storage.locks import LOCK, locked
from student.job import StudentJob
from student.models.adapters.files import ADAPTER_CONFIG, find_adapter
from student.models.presets import PRESETS
from student.report import PASSAGE_FILE, REPORT_FILE, RUN_FILE, Passage, TrainingReport
from student.training.arguments import PRESENTATION, RESERVED
from student.training.inputs import Data
from student.training.step import COMPUTE_ONLY

_KIND = "logit-cache training run"
_STAGE = "publishing"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_STATE_FILE = "trainer_state.json"

# Of what is committed to an entry a run may have thousands of ranges.
_BRIEF = reprlib.Repr()
_BRIEF.maxlist, _BRIEF.maxstring, _BRIEF.maxother = 4, 400, 400

# Fields that runs and sweeps of earlier versions may have recorded, and that no command can name any more.
_NOT_COMPARED = {f"{of}training.{name}" for of in ("", "job.") for name in RESERVED}

# Fields of a job that are identified by digests, or that change how a run computes and not what.
_NOT_THE_RUN = {"cache", "eval_cache", "output_dir", "teachers", "training", "fused_head", "live_teachers", "combine"}


def identity_of(job: StudentJob, values: Mapping[str, Any], data: Data, step_windows: int) -> dict[str, Any]:
    """The run's identity, as a flat mapping. Caches are identified by digests, so that they may move."""
    asked = job.model_dump(mode="json", exclude=_NOT_THE_RUN)
    asked["isolate_documents"] = data.windows.isolate_documents
    asked["bos_each_window"] = data.windows.begin_id is not None or None  # absent in runs from before there was one
    asked["pack_documents"] = data.windows.packed or None  # absent in runs from before there were any
    asked["windows_per_step"] = step_windows
    asked["merge"] = job.merge or None
    asked["available"] = asked["available"] or None  # absent in runs from before there was one
    asked["model_sha256"] = model_digest(job.model)
    asked |= {f"teachers.{teacher.name}": teacher.weight for teacher in job.teachers}
    asked |= {f"teachers.{teacher.name}.sources": list(teacher.sources) for teacher in job.teachers if teacher.sources}
    training = {name: value for name, value in values.items() if name not in PRESENTATION | COMPUTE_ONLY}
    asked |= {f"training.{name}": value for name, value in training.items()}
    return asked | {f"provenance.{name}": value for name, value in data.provenance.items()}


def model_digest(model: str) -> str | None:
    """sha256 of a model's local files, and those of an adapter's base, which may change under one name.

    None for presets and hub ids.
    """
    path = local_path(model)
    if model in PRESETS or not path.exists():
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin"):
            with file.open("rb") as opened:
                total.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    adapter = find_adapter(path)
    if adapter is not None:
        total.update(f"base {model_digest(adapter.base)}\n".encode())
    return total.hexdigest()


class OutputDirectory:
    """The folder of one run. Only the process with `writes` changes it; all processes get the same results."""

    def __init__(self, path: str, writes: bool = True) -> None:
        self.path = Path(path)
        self.stage = self.path / _STAGE
        self._writes = writes

    def check(self, identity: Mapping[str, Any]) -> None:
        """Check that the folder is this run's, or free for it; writes nothing.

        Raises InputError when it holds something else, IdentityMismatch (listing the fields) for another run.
        """
        stored = self.recorded().get("identity", identity)
        differing = [
            f"{name}: the run has {_BRIEF.repr(stored.get(name))}, this job {_BRIEF.repr(identity.get(name))}"
            for name in sorted(stored.keys() | identity.keys())
            if name not in _NOT_COMPARED and stored.get(name) != identity.get(name)
        ]
        if differing:
            raise IdentityMismatch(
                str(self.path), differing, "It is the folder of another run: give another --output-dir"
            )

    def check_writable(self) -> None:
        """Raise InputError, before the work, where an unfinished run's folder cannot be written."""
        if self._writes and self.report() is None:
            check_writable(self.path, f"--output-dir {self.path}")

    def recorded(self) -> dict[str, Any]:
        """The record of `reserved`: the run's `identity` and its first `launch`; empty for a new folder.

        Raises InputError when the folder holds something else.
        """
        try:
            names = {name for name in os.listdir(self.path) if name != LOCK and not name.endswith(PARTIAL)}
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise InputError(f"{self.path} is a file or lies in one; --output-dir is a folder: give another") from None
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; give another --output-dir") from None
        if RUN_FILE not in names:
            if names:
                shown = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
                raise InputError(
                    f"{self.path} holds {shown} and is not the folder of a training run: give an empty or new "
                    f"--output-dir"
                )
            return {}
        try:
            data = json.loads((self.path / RUN_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path / RUN_FILE}: cannot be read ({error}); give another --output-dir") from None
        if not isinstance(data, dict) or data.get("kind") != _KIND or not isinstance(data.get("identity"), dict):
            raise InputError(f"{self.path / RUN_FILE} is not of a training run: give another --output-dir")
        return data

    @contextlib.contextmanager
    def reserved(self, identity: Mapping[str, Any], **launch: Any) -> Iterator[None]:
        """Create the folder, after `check`, record the run in it, and hold its lock while the body runs.

        launch: facts of the first launch, recorded beside the identity and no part of it.
        A new record goes again where the body fails before it leaves anything else there: the folder is no run's then.
        Raises InputError where the folder cannot be written, or another process works there.
        """
        with contextlib.ExitStack() as held:
            if self._writes:
                with self._errors():
                    if not self.path.is_dir():
                        self.path.mkdir(parents=True, exist_ok=True)
                        held.callback(self._remove_if_empty)
                    held.enter_context(locked(self.path, "another training run"))
                    if self._begin(identity, launch):
                        held.push(self._forget_on_error)
                    shutil.rmtree(self.stage, ignore_errors=True)
            yield

    def _forget_on_error(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None and {RUN_FILE, LOCK}.issuperset(os.listdir(self.path)):
            (self.path / RUN_FILE).unlink()

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def share(self, identity: Mapping[str, Any], **launch: Any) -> dict[str, Any]:
        """Create and record the folder as `reserved` does, for several processes at once; returns the record."""
        with self._errors():
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path, "another process", wait=True):
                self._begin(identity, launch)
        return self.recorded()

    def _begin(self, identity: Mapping[str, Any], launch: Mapping[str, Any]) -> bool:
        """Record the run where the folder has no record; whether it had none."""
        # Another process may have been here since the caller's check.
        self.check(identity)
        if (self.path / REPORT_FILE).exists():
            raise InputError(f"{self.path}: another process has just finished this run: run the command again")
        is_new = not (self.path / RUN_FILE).exists()
        if is_new:
            record = {"kind": _KIND, "identity": dict(identity), "launch": launch}
            _write(self.path / RUN_FILE, json.dumps(record, indent=1, sort_keys=True))
        return is_new

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_out_of_space(error):
                raise
            raise InputError(f"cannot write to {self.path}: {error.strerror}; give another --output-dir") from None

    def report(self) -> TrainingReport | None:
        """The report of the finished run, or None while it is not finished."""
        path = self.path / REPORT_FILE
        try:
            return TrainingReport.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise InputError(
                f"{path}: not the report of a run ({error.errors()[0]['msg']}); remove it to finish the run again"
            ) from None

    def last_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its trainer state, None without one.

        The state is written last: a checkpoint without it was being written when the run was killed, and is removed,
        since transformers would take the highest number for the newest. Raises InputError where one cannot be read:
        that says nothing about what it holds.
        """
        found: list[tuple[int, Path, dict[str, Any]]] = []
        for folder in self.path.iterdir() if self.path.is_dir() else ():
            match = _CHECKPOINT.match(folder.name)
            if match is None:
                continue
            try:
                state = json.loads((folder / _STATE_FILE).read_bytes())
            except (FileNotFoundError, NotADirectoryError, ValueError):
                if self._writes:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            except OSError as error:
                raise InputError(
                    f"{folder / _STATE_FILE}: cannot be read ({error.strerror}), so the run cannot resume: run the "
                    "command again when it can be, or move this checkpoint away to resume from an earlier one"
                ) from None
            found.append((int(match[1]), folder, state))
        if not found:
            return None
        _, folder, state = max(found, key=lambda item: item[0])
        return folder, state

    def write_passage(self, passage: Passage) -> None:
        """Write what the model expects; before the report, with which the run is finished."""
        if self._writes:
            _write(self.path / PASSAGE_FILE, passage.model_dump_json())

    def publish(self, report: TrainingReport) -> None:
        """Rename the staged model into the folder and write the report, in an order that is safe to interrupt."""
        names = sorted(os.listdir(self.stage), key=lambda name: (name in ("config.json", ADAPTER_CONFIG), name))
        for name in names:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            os.replace(self.stage / name, self.path / name)
        self.stage.rmdir()
        _write(self.path / REPORT_FILE, report.model_dump_json(indent=1))


@contextlib.contextmanager
def full_disk_is_reported(path: str) -> Iterator[None]:
    """Turn the errors that libraries raise on a full disk into `StorageFull`."""
    try:
        yield
    except Exception as error:
        if _is_full_disk(error):
            raise StorageFull(
                f"no space left while writing under {path}: free some room and run the command again, it resumes "
                f"from the last complete checkpoint"
            ) from error
        raise


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return is_out_of_space(error)
    # safetensors and torch's zip writer raise classes of their own: one has the errno in its message, the other only
    # that a write failed.
    number = re.search(r"os error (\d+)", str(error))
    if number is not None:
        return is_out_of_space(OSError(int(number[1]), ""))
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("PytorchStreamWriter failed writing", "unexpected pos ")
    )


def _write(path: Path, text: str) -> None:
    replace_file(path, (text + "\n").encode())
