"""Format of a cache: the specification. Token streams and teacher entries have version 1 or 2, receipts 1.

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
    teachers/<name>/<array>/       the arrays of "Targets" or, in version 2 of the entry, of "Targets in version 2"
    teachers/<name>/receipts/<shard>.json   ShardReceipt
    teachers/<name>/sampling_order/         uint32   [V]   only where the record has the order "embeddings"
    teachers/<name>/receipts/sampling_order/<shard>.json   ShardReceipt, of the one shard of the order
    teachers/<name>/fidelity.json  optional: FidelityReport (storage.format.fidelity)

A folder of receipts also holds `index.json` (ReceiptIndex) once every shard is committed. A cache shared without its
text has no token stream arrays (`tokens_included` false) and nothing of the label (`has_label_logprob` false, or no
field "label").

**Targets.** Row `t` of every array is about the teacher's distribution of token `t + 1`, given the tokens of its window
up to `t`, normalised over the V columns of the vocabulary (`V` is the entry's, also for the type of `token_ids`). All
logs are natural. A column is *valid* in a row if its number is below `kept`. No NaN or infinity occurs, except those
named here. In version 1 of an entry the arrays are::

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

**Log-probs from codes.** In version 1 of an entry
``logprob[t, i] = top_logprob[t] - step_nats * cumsum(logprob_codes[t])[i]``, with `step_nats` from
`attributes["logit_cache"]["encoding"]`. Column i >= 1 is within `step_nats / 2` of the teacher's value, column 0 within
the rounding of `top_logprob`. The float32 [N] arrays keep `mantissa_bits` explicit bits (12: relative error 2**-13).
Log-probs under the floor ``-min(2000, floor(65535 * step_nats) - 1)`` (-2000 at the default step of 1/32) are stored as
it. In an entry made from another (`derived_from`), log-probs, and tails that pruned ids joined, are within one
`step_nats`.

**Targets in version 2.** The `format_version` of the TeacherEntry decides; entries of both versions may lie in one
cache, and a program that knows version 1 alone refuses an entry of version 2 by its record. The arrays follow from the
record: from its encoding (codes or float32), and from `targets.fields`, what is stored beside the ids, the log-probs of
the certain ones and the mass outside them::

    of all with ids    ids as tokens [N, K], kept uint16 [N], certain uint16 [N]

    field              encoding "codes"                  encoding "float32"
    (with ids)         certain_codes    uint16 [N, K]    certain_logprobs  float32 [N, K]
    tail "exact"       mass_code        int16  [N]       log_tail          float32 [N]
    sampled-logprobs   sampled_codes    uint16 [N, K]    sampled_logprobs  float32 [N, K]
    half-tail          half_tail_code   int16  [N]       log_tail_half     float32 [N]
    label              label_code       int16  [N]       label_logprob     float32 [N]
    entropy            entropy_code     int16  [N]       entropy           float32 [N]

An entry of the method "none" has no ids: K = 0, of its fields the label alone, the tail "unknown", and so that one
array. A row without targets, and one that no token follows, has none there; all else below is about rows with ids.

A row has `certain` ids that are there with certainty, by descending log-prob, equal ones by ascending id, and then
sampled ones, ``m = kept - certain``, by ascending id. Top-k samples none. Where `targets.sample_size` is "threshold",
rows differ in size: ids of at least 1 / K of a row's mass are certain, and no sampled one stands for more. `kept` = 0
means that the row has no targets: then `certain` is 0 too, and every number but the label's is none. Where
`targets.positions` is "all" there are no such rows, where it is "trained" they are those in which the loss mask is
False, where it is "some" they may be any. Where the record has `targets.sources`, rows in documents of sources with
other names have none either; a row is in the document of its own token. Of documents of more than
`targets.document_tokens` tokens, `targets.long_documents` leaves targets to as many first rows (truncate) or to none
(drop). With `targets.tail` "unknown" nothing is stored
of the mass outside the ids, and log-probs are relative to that of the ids. Columns are::

    column i           ids                                      certain_*      sampled_*
    i < certain        the id                                   its log-prob   0
    i = certain < kept the least sampled id                     0              its log-prob
    certain < i < kept the id minus that of column i - 1        0              its log-prob
    i >= kept          0                                        0              0

A difference of 0, an id that comes twice, occurs in projected entries alone. Numbers of a position are codes of 16 bits
with sign: -32768 for none (NaN as float32), -32767 for -inf; 32767 is the fill value and never stored. Others are
``value_step_nats * code``, and values beyond the codes -32766 and 32765 are stored as these. `mass_code` is in units of
`step_nats`; there 32766 says that no id is certain. With `P` the mass of the certain ids, `R` that outside them, and
`tau` the temperature that ids were sampled for::

    x           = step_nats * mass_code = log(R / P)
    log P       = -log(1 + exp(x)),  log R = -log(1 + exp(-x))
                  -32767: log P = 0, log R = -inf;  32766: no id is certain, log R = 0;  tail "unknown": log P = 0
    steps_i     = cumsum(certain_codes)_i                                            i < certain
    logprob_i   = log P - log(sum_j exp(-step_nats * steps_j)) - step_nats * steps_i
    log R_tau   = log R for tau = 1, value_step_nats * half_tail_code for tau = 2
    logprob_i   = tau * (log R_tau - log m) + step_nats - sampled_step_nats * sampled_codes_i     certain <= i < kept

The mass outside the certain ids is -inf exactly where there is none: where they are all V, or where a teacher gives the
others no probability, and then no id is sampled. Errors against the teacher::

    log-prob of a certain id         1.5 * step_nats; of two of one row against each other, step_nats
    P, R                             step_nats / 2 of relative error
    P + R                            1, to rounding
    half-tail, label, entropy        value_step_nats / 2
    log-prob of a sampled id         sampled_step_nats; rounded up or down at random, so that the mean of 1 / p is that
                                     of the teacher; at most tau * (log R_tau - log m) + step_nats

As float32 all are the teacher's own. Log-probs under the floor of version 1 are stored as it. Random numbers are
functions of (seed, use, position): `storage.format.chance`. `sampling_order` holds each id once, in the order in which
ids lie when some are sampled, where this is not their own. It is committed before the first shard of the targets, and
no other takes its place.

**Windows.** A teacher reads windows of `context_tokens`. Within a document (or the whole stream, when documents are not
isolated) of `L` positions, position `r` is scored by the one window ``[s, min(s + context, L))`` with
``s = max(0, (r // stride + 1) * stride - context)``: the window whose last `stride` positions include `r`, so that
every position but the first ones has at least `context - stride` tokens of left context. Where the record has a
`begin_id`, the teacher reads this id before the tokens of every window whose first token is another, and nothing is
stored for it. How windows lie in the teacher's batches (`execution.rows`) changes the last bits of targets at most.

**Imported entries.** An entry that was made from somebody's files (`made` is "imported") has `imported_from`: the
name of their format, their names, lengths and sha256, what their numbers are, and which token a row of theirs was
about, with the mean log-prob of that token and of its neighbour, by which this was decided. Of its teacher only what
somebody says is known: `source`, and none of the digests. Each of its documents was read by itself, in whatever way;
`windowing` has the length of the longest one, and `execution` knows nothing ("unknown"). Where the rounding of a
log-prob in the files has a bound, `error_nats`, it adds to the errors above.

**Projected entries.** An entry that was made from one in another vocabulary (`made` is "projected") has
`projected_from`: the digests of that entry's record, of its stream and its tokenizer, how many positions of both
streams end at the same byte, and how far the first token of an id's bytes is uncertain. Rows stand at such positions
alone; where `aligned` is "replies", two chat templates rendered the same conversations, and positions are those of the
replies. Certain ids are sums over ids of the source that were certain there, lower bounds of their probabilities; the
rest is in the mass outside. Sampled ids may repeat, and may be certain ids, too: weights add up. `windowing` is that of
the source, in its own tokens.

**Versions.** Version 2 of the CacheRecord has the array `document_sources` and fields about how the stream was made:
`begins_with_bos`, `template_sha256`, `template_variables`, `date`, `skipped_rows`, and `rollouts`, the model whose
samples the tokens are, and how it was sampled. Fields that are absent, there and
elsewhere, are left out of the JSON. Teacher entries have versions of their own ("Targets in version 2"), receipts
version 1.

**Shards and chunks.** Every array is cut along its first axis into shards of `layout.shard` entries (`layout` of the
TeacherEntry; `tokens_layout` and `documents_layout` of the CacheRecord; a sampling order is one shard of chunks of
65,536). A shard is one object, `<array>/c/<shard>`, or `<array>/c/<shard>/0` for [N, K]: compressed chunks of
`layout.chunk` entries, then the shard index (codec `sharding_indexed`, index at the end; inner codecs `bytes`, `blosc`,
`crc32c`; index codecs `bytes`, `crc32c`; see `storage.format.layout.ArraySpec.metadata`). All chunks are written, also
those that equal the fill value, except those of the last shard that lie wholly behind the end of the array. The last
chunk of the array is padded with the fill value: the largest integer of the type, or NaN (False for bool, which has
none to spare), so that missing data shows.

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
