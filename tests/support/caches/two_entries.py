"""Sizes of the cache that the tests of storage share: V ids, N positions, K kept."""

from __future__ import annotations

V, N, K = 507, 1000, 33
