"""What the tests of storage share: sizes of a cache, V ids, N positions, K kept; and the type of what is in one."""

import numpy as np

from storage import SparseTargets

V, N, K = 507, 1000, 33
Stream = tuple[np.ndarray, SparseTargets]  # tokens uint16 [N], and their targets
