"""Format of a cache: the specification. Entries and receipts have version 1, token streams 1 or 2.

A cache is a Zarr v3 group. Any Zarr v3 reader opens it; nothing in it is code. `N` is the number of tokens, `D` of
documents, `V` the vocabulary size (the largest token id + 1), `K` the number of stored ids per position. The V of a
teacher entry may be smaller than the tokenizer's, where the teacher's output layer has fewer columns than the tokenizer
has ids: the entry's targets are about the ids below its own V, and every token of the stream is one of them.

**Files.** ``<shard>`` is the number of a shard, from 0; receipts write it with at least 8 digits::

    zarr.json                      group; attributes["logit_cache"] = CacheRecord
    tokens/                        uint16 iff V <= 65,535, else uint32   [N]
    document_starts/               uint64   [D]   first position of each document, ascending; the first is 0
    document_sources/              uint16   [D]   since version 2 of the CacheRecord: the number of its source in it
    loss_mask/                     bool     [N]   optional: True where the *next* token is trained on
    tokenizer/                     the tokenizer's own files
    receipts/tokens/<shard>.json   and likewise for document_starts, document_sources and loss_mask
    receipts/tokenizer.json        FilesReceipt
    teachers/zarr.json             group
    teachers/<name>/zarr.json      group; attributes["logit_cache"] = TeacherEntry; never rewritten
    teachers/<name>/<array>/       the arrays of "Targets"
    teachers/<name>/receipts/<shard>.json   ShardReceipt
    teachers/<name>/fidelity.json  optional: FidelityReport (storage.format.fidelity)

A folder of receipts also holds `index.json` (ReceiptIndex) once every shard is committed. A cache shared without its
text has no token stream arrays (`tokens_included` false) and no `label_logprob` (`has_label_logprob` false).

**Targets.** Row `t` of every array is about the teacher's distribution of token `t + 1`, given the tokens of its window
up to `t`, normalised over the V columns of the vocabulary (`V` is the entry's, also for the type of `token_ids`). All
logs are natural. A column is *valid* in a row if its number is below `kept`. No NaN or infinity occurs, except those
named here::

    token_ids      as tokens [N, K] ids by descending log-prob, equal ones by ascending id; not valid: type's maximum
    logprob_codes  uint16   [N, K]  log-probs, encoding "codes"; column 0 and columns that are not valid: 0
    logprobs       float32  [N, K]  log-probs, encoding "float32", in place of logprob_codes; not valid: 0
    kept           uint16   [N]     number of valid columns, the leading ones
    certain        uint16   [N]     so many leading ids are certain to be in the row; the other valid ones are sampled
    top_logprob    float32  [N]     log-prob of column 0
    log_tail       float32  [N]     log of the mass outside the certain ids; -inf exactly when certain = V
    log_tail_half  float32  [N]     log of the sum of p**0.5 outside the certain ids; -inf exactly when certain = V
    label_logprob  float32  [N]     log-prob of tokens[t + 1]; NaN exactly at t = N - 1 and, when documents are
                                        isolated, at the last position of each
    entropy        float32  [N]     entropy of the whole distribution

**Log-probs from codes.** ``logprob[t, i] = top_logprob[t] - step_nats * cumsum(logprob_codes[t])[i]``, with `step_nats`
from `attributes["logit_cache"]["encoding"]`. Column i >= 1 is within `step_nats / 2` of the teacher's value, column 0
within the rounding of `top_logprob`. The float32 [N] arrays keep `mantissa_bits` explicit bits (12: relative error
2**-13). Log-probs under the floor ``-min(2000, floor(65535 * step_nats) - 1)`` (-2000 at the default step of 1/32) are
stored as it. In an entry made from another (`derived_from`), log-probs, and tails that pruned ids joined, are within
one `step_nats`.

**Windows.** A teacher reads windows of `context_tokens`. Within a document (or the whole stream, when documents are not
isolated) of `L` positions, position `r` is scored by the one window ``[s, min(s + context, L))`` with
``s = max(0, (r // stride + 1) * stride - context)``: the window whose last `stride` positions include `r`, so that
every position but the first ones has at least `context - stride` tokens of left context. Where the record has a
`begin_id`, the teacher reads this id before the tokens of every window whose first token is another, and nothing is
stored for it.

**Versions.** Version 2 of the CacheRecord has the array `document_sources` and fields about how the stream was made:
`begins_with_bos`, `template_sha256`, `template_variables`, `date`, `skipped_rows`. Fields that are absent, there and
elsewhere, are left out of the JSON. Receipts and teacher entries have versions of their own.

**Shards and chunks.** Every array is cut along its first axis into shards of `layout.shard` entries (`layout` of the
TeacherEntry; `tokens_layout` and `documents_layout` of the CacheRecord). A shard is one object, `<array>/c/<shard>`, or
`<array>/c/<shard>/0` for [N, K]: compressed chunks of `layout.chunk` entries, then the shard index (codec
`sharding_indexed`, index at the end; inner codecs `bytes`, `blosc`, `crc32c`; index codecs `bytes`, `crc32c`; see
`storage.format.layout.ArraySpec.metadata`). All chunks are written, also those that equal the fill value, except those
of the last shard that lie wholly behind the end of the array. The last chunk of the array is padded with the fill
value: the largest integer of the type, or NaN (False for bool, which has none to spare), so that missing data shows.

**Records and receipts.** Every JSON record (`storage.format.manifest`) holds in its field `sha256` the sha256 of its
own canonical JSON: UTF-8, sorted keys, no white space, without that field. A shard exists if its receipt does. The
receipt is written after the objects and holds, of each, its byte length, its sha256 and its seal: the sha256 of the
shard index (``16 * chunks + 4`` bytes at the object's end) followed by the last 4 bytes (the crc32c) of every chunk in
the order of the index. (The first writers left the checksums out of the seal where the index has absent chunks.) The
seal exposes a missing, short, damaged or swapped object without reading all of it. `index.json` holds the sha256 field
of every receipt, in order.

**Fidelity.** `fidelity.json` states how far the targets are from the teacher's full distributions, in aggregate numbers
measured on a sample. It carries the sha256 of its own canonical JSON and of the entry's record. Nothing depends on it:
a reader that does not know it reads the same targets, and an entry without it is equally valid.
"""
