"""Window arithmetic: disjoint and complete cover, whatever the cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_cache.caching.windows import windows
from storage.format.layout import MAX_OBJECT_BYTES, entry_layout
from storage.format.manifest.entry import Windowing


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, Windowing, np.ndarray]:
    positions = draw(st.integers(1, 300))
    context = draw(st.integers(1, 40))
    stride = draw(st.integers(1, context))
    starts = draw(st.sets(st.integers(0, positions - 1), max_size=10)) | {0}
    windowing = Windowing(context_tokens=context, stride_tokens=stride, isolate_documents=draw(st.booleans()))
    return positions, windowing, np.array(sorted(starts), dtype=np.uint64)


@settings(max_examples=300, deadline=None)
@given(plans(), st.data())
def test_every_position_is_scored_by_the_window_that_the_format_names(
    plan: tuple[int, Windowing, np.ndarray], data: st.DataObject
) -> None:
    positions, windowing, starts = plan
    context, stride = windowing.context_tokens, windowing.stride_tokens
    low = data.draw(st.integers(0, positions))
    high = data.draw(st.integers(low, positions))
    scored = []
    for window in windows(low, high, positions, windowing, starts):
        assert window.start <= window.first < window.last <= window.stop <= window.start + context
        for position in range(window.first, window.last):
            begin, end = 0, positions
            if windowing.isolate_documents:
                after = int(np.searchsorted(starts, position, side="right"))
                begin, end = int(starts[after - 1]), int([*starts, positions][after])
            assert window.start == begin + max(0, ((position - begin) // stride + 1) * stride - context)
            assert (window.stop, window.end) == (min(window.start + context, end), end)
            scored.append(position)
    assert scored == list(range(low, high))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**9), st.integers(1, 16_384), st.integers(1, 512))
def test_layouts_are_multiples_and_within_one_put(positions: int, k: int, stride: int) -> None:
    if stride * 4 * k > MAX_OBJECT_BYTES:
        return
    layout = entry_layout(positions, k, stride)
    assert layout.chunk % stride == 0
    assert layout.shard % layout.chunk == 0
    assert layout.shard * 4 * k <= MAX_OBJECT_BYTES


@pytest.mark.parametrize(
    ("shard", "chunk"), [(1000, None), (1024, 100), (100, 200)], ids=["stride", "chunk", "chunk above shard"]
)
def test_sizes_that_do_not_divide_are_refused(shard: int, chunk: int | None) -> None:
    with pytest.raises(ValueError, match="multiple"):
        entry_layout(10_000, 64, 128, shard_tokens=shard, chunk_tokens=chunk)
