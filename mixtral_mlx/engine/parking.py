"""Threads to run MLX on, parked when they are no longer needed and used again.

MLX keeps streams, each with a thread, for every thread that has used it. They would pile up with every model that is
loaded and closed; and when a thread ends while the process does, taking its streams down aborts the process (MLX
0.32). So such a thread never ends by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

NAME = "mixtral-engine"

_Queue = SimpleQueue[tuple[Callable[[], object], threading.Event]]
_lock = threading.Lock()
_parked: list[_Queue] = []


def run(work: Callable[[], object]) -> threading.Event:
    """Begin `work` on a parked thread, or on a new one; returns what is set when it is done."""
    done = threading.Event()
    with _lock:
        queue = _parked.pop() if _parked else _started()
    queue.put((work, done))
    return done


def _started() -> _Queue:
    queue: _Queue = SimpleQueue()
    threading.Thread(target=_serve, args=[queue], name=NAME, daemon=True).start()
    return queue


def _serve(queue: _Queue) -> None:
    while True:
        work, done = queue.get()
        try:
            work()
            # Let go of before, and parked before it is done, so that who waited for that finds both so.
            del work
            with _lock:
                _parked.append(queue)
        finally:
            done.set()  # Also where the work failed: then this thread ends with it, and is not used again.
