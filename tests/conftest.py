"""What holds for all tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core already: two threads in each would wait for one another.
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
