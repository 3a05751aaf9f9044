"""A program of its own that compiles one grammar, to see what that costs before a process that matters does it.

Only the standard library and llguidance's extension, whose file it is told, so that it starts in a few hundredths of a
second. Prints what is wrong, or nothing. Exits with TOO_LARGE or TOO_SLOW, or dies of its stack, if it is too much."""

import json
import os
import resource
import sys
import threading
import time
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

TOO_LARGE, TOO_SLOW = 3, 4
_LOOK_EVERY_S = 0.005


class Letters:
    """The smallest tokenizer llguidance takes: every byte, and an end."""

    is_tokenizer_wrapper = True
    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([n]) for n in range(256)), b"</s>")
    special_token_ids = (256,)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def main() -> None:
    task: dict[str, Any] = json.load(sys.stdin)
    library = _library(task["library"])
    tokenizer = library.LLTokenizer(Letters())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = _memory_bytes() + task["memory_bytes"], time.process_time() + task["cpu_seconds"]
    threading.Thread(target=_watch, args=most, daemon=True).start()
    # A stack no larger than that of the thread it is to be compiled on later.
    threading.stack_size(task["stack_bytes"])
    compiling = threading.Thread(target=_prove, args=(library, tokenizer, task["grammar"], task["limits"]))
    compiling.start()
    compiling.join()


def _prove(library: Any, tokenizer: Any, grammar: str, limits: dict[str, Any]) -> None:
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**limits))
    # Beyond the letters that are certain, or it would not be seen that nothing, or no end, can follow them.
    if not matcher.is_error() and matcher.consume_tokens(matcher.compute_ff_tokens()):
        matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())
    sys.stdout.flush()
    os._exit(0)


def _watch(most_bytes: int, most_seconds: float) -> None:
    while True:
        if _memory_bytes() > most_bytes:
            os._exit(TOO_LARGE)
        if time.process_time() > most_seconds:
            os._exit(TOO_SLOW)
        time.sleep(_LOOK_EVERY_S)


def _memory_bytes() -> int:
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts the parent's memory into the same number.
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _library(file: str) -> Any:
    loader = ExtensionFileLoader("_lib", file)
    spec = spec_from_loader("_lib", loader)
    assert spec
    library = module_from_spec(spec)
    loader.exec_module(library)
    return library


if __name__ == "__main__":
    main()
