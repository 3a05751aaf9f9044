"""What holds for all tests."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core already: two threads in each would wait for one another.
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and tests of Ctrl-C would wait for it forever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
