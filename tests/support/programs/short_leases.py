"""`cache-logits` whose leases, and those of its workers, last for so many seconds.

python tests/support/programs/short_leases.py SECONDS ARGUMENTS…
"""

from __future__ import annotations

import sys

import storage.cache.leases

# Worker processes import this script, too.
storage.cache.leases.LEASE_SECONDS = float(sys.argv[1])

if __name__ == "__main__":
    from logit_cache.cli.main import cache_logits

    cache_logits(sys.argv[2:])
