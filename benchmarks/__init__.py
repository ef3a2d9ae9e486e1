"""What structured sparsity saves on the clock, beside the dense operation: `python -m benchmarks`."""

import os

# Both sides run with torch's large blocks in huge pages where the system has them: otherwise every result of 32 MiB and
# more is a fresh mapping, whose page faults take longer than the sparse products. Torch reads it when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
