"""A cache without its text: which records and receipts change when the tokens stay behind.

The token stream goes, and with it `label_logprob`, which is the one array that was made from the *next* token: a
stored id whose log-prob equals it is that token. What is left still reveals text, because a teacher that knows it
expects its words; this is a smaller leak, not none. All other objects keep their bytes.
"""

from __future__ import annotations

from storage.format.fidelity import FidelityReport
from storage.format.manifest import CacheRecord, ShardReceipt, TeacherEntry
from storage.format.sealing import digest

LABEL = "label_logprob"


def without_tokens(record: CacheRecord) -> CacheRecord:
    """The record of the same cache without the arrays of the token stream; its digest of them stays."""
    return record.model_copy(update={"corpus": record.corpus.model_copy(update={"tokens_included": False})})


def without_label(entry: TeacherEntry) -> TeacherEntry:
    """The same entry without `label_logprob`, derived from the original; itself if it has none."""
    if not entry.targets.has_label_logprob:
        return entry
    targets = entry.targets.model_copy(update={"has_label_logprob": False})
    return entry.model_copy(update={"targets": targets, "derived_from": digest(entry)})


def receipt_without_label(receipt: ShardReceipt, record_sha256: str) -> ShardReceipt:
    """What commits the same shard of the entry without `label_logprob`; the same at every call, so copying resumes."""
    objects = {name: item for name, item in receipt.objects.items() if name != LABEL}
    # Sums over label_logprob go with it: they are the teacher's loss on the text, shard by shard, and a summary made
    # of them would speak of an array that is not there.
    statistics = receipt.statistics and receipt.statistics.model_copy(update={"labelled": 0, "label_nats": 0.0})
    return receipt.model_copy(update={"record_sha256": record_sha256, "objects": objects, "statistics": statistics})


def report_without_label(report: FidelityReport, record_sha256: str) -> FidelityReport:
    """The same fidelity report, bound to the entry without `label_logprob`.

    Its figures are aggregates over the whole sample and stay, the sizes of the original entry among them.
    """
    return report.model_copy(update={"record_sha256": record_sha256})
