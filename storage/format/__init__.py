"""Format v1: what lies where in a cache. This docstring is the specification.

A cache is a Zarr v3 group. Any Zarr v3 reader opens it; nothing in it is code. `N` is the number of tokens,
`D` of documents, `V` the size of the vocabulary, `K` the stored ids per position.

::

    zarr.json                      group; attributes["logit_cache"] = CacheRecord (storage.format.manifest)
    tokens/                        uint16 iff V <= 65,535, else uint32   [N]
    document_starts/               uint64   [D]   ascending; the first is 0
    loss_mask/                     bool     [N]   optional: True where the *next* token is trained on
    tokenizer/                     the tokenizer's own files
    receipts/tokens/<shard>.json   and likewise for document_starts and loss_mask
    receipts/tokenizer.json
    teachers/zarr.json             group
    teachers/<name>/zarr.json      group; attributes["logit_cache"] = TeacherEntry; never rewritten
    teachers/<name>/token_ids      uint16 iff V <= 65,535, else uint32   [N, K]
    teachers/<name>/logprob_codes  uint16   [N, K]  (encoding "codes")    column 0 is 0
    teachers/<name>/logprobs       float32  [N, K]  (encoding "float32")
    teachers/<name>/kept           uint16   [N]
    teachers/<name>/certain        uint16   [N]
    teachers/<name>/top_logprob, log_tail, log_tail_half, label_logprob, entropy      float32 [N]
    teachers/<name>/receipts/<shard>.json   and receipts/index.json once every shard is committed
    teachers/<name>/fidelity.json  optional: FidelityReport (storage.format.fidelity)

**Targets.** Row `t` is the teacher's distribution of token `t + 1` given the tokens of its window up to `t`,
normalised over the V columns of the vocabulary. The first `kept[t]` columns of `token_ids` are valid, in the
order (log-prob descending, id ascending); the others hold the type's maximum, and a code or log-prob of 0.
`certain[t]` of them are there with certainty. `log_tail` is the log of the mass outside the certain ids and
`log_tail_half` the log of the sum of p**0.5 there; both are -inf exactly when `certain = V`. `label_logprob` is
the log-prob of `tokens[t+1]`, NaN exactly at `t = N - 1` and, when documents are isolated, at the last position
of each. No other NaN or infinity occurs. All logs are natural.

**Log-probs from codes.** ``logprob[t, i] = top_logprob[t] - step_nats * cumsum(logprob_codes[t])[i]``, with
`step_nats` from `attributes["logit_cache"]["encoding"]`. Column i >= 1 is within `step_nats / 2` of the
teacher's value, column 0 within the rounding of `top_logprob`. Floats keep `mantissa_bits` explicit bits
(12: relative error 2**-13). Log-probs under `logprob_floor(step_nats)` (-2000 at the default) are stored as it. In an
entry that was made from another (`derived_from`), log-probs and the tails that ids joined are within one `step_nats`.

**Windows.** A teacher reads windows of `context_tokens`. Within a document (or the whole stream, when
documents are not isolated) of `L` positions, position `r` is scored by the one window
``[s, min(s + context, L))`` with ``s = max(0, (r // stride + 1) * stride - context)``: the window whose last
`stride` positions include `r`, so that every position but the first ones has at least `context - stride`
tokens of left context.

**Shards and chunks.** Every array is cut along its first axis into shards of `layout.shard` entries, one
object each (`<array>/c/<shard>` or `<array>/c/<shard>/0`), and every shard into compressed chunks of
`layout.chunk` entries (codec `sharding_indexed`, index at the end; inner codecs `bytes`, `blosc`, `crc32c`;
index codecs `bytes`, `crc32c`). All chunks are written, also those that equal the fill value, except those of the
last shard that lie wholly behind the end of the array. Its last chunk is filled up with the fill value, which is
poison: the largest integer, or NaN.

**Receipts.** A shard exists if its receipt does. The receipt is written after the objects and holds, of each,
its byte length, its sha256 and its seal: the sha256 of the shard index at the object's end (``16 * chunks + 4``
bytes) followed by the last 4 bytes (the crc32c) of every chunk in the order of the index. The seal tells a
missing, short, damaged or swapped object without reading all of it. `receipts/index.json` holds the sha256
field of every receipt, in order.

**Fidelity.** `fidelity.json` says how far the targets are from the teacher's full distributions, in aggregate numbers
measured on a sample. It carries the sha256 of its own canonical JSON and of the entry's record. Nothing depends on it:
a reader that does not know it reads the same targets, and an entry without it lacks nothing.
"""
