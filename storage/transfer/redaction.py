"""A cache without its text: the records and receipts that change when the tokens are left out.

The token stream is left out, and with it the label's log-probs, the one array that was made from the *next* token: a
stored id whose log-prob equals it is that token. The other targets still reveal text, because a teacher that knows it
expects its words; this is a smaller leak, not none. All other objects keep their bytes.
"""

from __future__ import annotations

from collections.abc import Collection

from storage.format.fidelity import FidelityReport
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.receipts import ShardReceipt
from storage.format.sealing import digest


def without_tokens(record: CacheRecord) -> CacheRecord:
    """The record of the same cache without the arrays of the token stream; it keeps the digest of them."""
    return record.model_copy(update={"corpus": record.corpus.model_copy(update={"tokens_included": False})})


def without_label(entry: TeacherEntry) -> TeacherEntry:
    """The same entry without the label's log-probs, derived from the original.

    Itself if it is of version 1 and has none; one of version 2 may have sums over them in its receipts all the same.
    """
    if entry.format_version == 1 and not entry.targets.has("label"):
        return entry
    return entry.model_copy(update={"targets": entry.targets.without("label"), "derived_from": digest(entry)})


def receipt_without_label(receipt: ShardReceipt, arrays: Collection[str], record_sha256: str) -> ShardReceipt:
    """The receipt of the same shard of the entry without the label's log-probs, whose `arrays` are the others;
    deterministic, so that a copy resumes."""
    objects = {name: item for name, item in receipt.objects.items() if name in arrays}
    # Sums over them are removed too: they are the teacher's loss on the text, shard by shard, and a summary of
    # them would be of an array that is not there.
    statistics = receipt.statistics and receipt.statistics.model_copy(update={"labelled": 0, "label_nats": 0.0})
    return receipt.model_copy(update={"record_sha256": record_sha256, "objects": objects, "statistics": statistics})


def report_without_label(report: FidelityReport, record_sha256: str) -> FidelityReport:
    """The same fidelity report, bound to the entry without the label's log-probs.

    Its figures are aggregates over the whole sample and stay, the sizes of the original entry among them.
    """
    return report.model_copy(update={"record_sha256": record_sha256})
