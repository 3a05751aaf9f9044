"""How long to go on asking a hub that fails: what goes wrong in a row is counted, waited for, and in the end given up.

Asks nothing itself: that is left to `listing`, for what there is, and `fetch`, for the files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx2
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

from ..config import MixtralError

GO_ON = "Run the same command again to go on; what has been fetched is kept."
_LONGEST_PAUSE_S = 60.0


class HubError(MixtralError):
    """Something cannot be had from the hub, or could not be fetched whole."""


@dataclass(frozen=True)
class Patience:
    """How long to go on when nothing new arrives: `tries` in a row, `seconds` in all; and how to wait."""

    tries: int = 10
    seconds: float = 1800.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


class PassingError(Exception):
    """Something went wrong that may go right the next time, after `pause_s` if the server said so.

    `unfit`: the answer was not what was asked for."""

    def __init__(self, found: str, *, pause_s: float = 0.0, unfit: bool = False) -> None:
        super().__init__(found)
        self.pause_s = pause_s
        self.unfit = unfit


class Setbacks:
    """Counts what goes wrong in a row: waits longer each time, and gives up in the end.

    `check` is called while waiting and raises when that is to stop."""

    def __init__(self, what: str, patience: Patience, check: Callable[[], None] = lambda: None) -> None:
        self.what = what
        self.patience = patience
        self.check = check
        self.forget()

    def forget(self) -> None:
        self.tries = 0
        self.since = self.patience.clock()

    def bear(self, error: Exception) -> None:
        """Wait until it is time to try again, or raise `HubError`."""
        self.tries += 1
        pause = max(getattr(error, "pause_s", 0.0), min(0.5 * 2 ** (self.tries - 1), _LONGEST_PAUSE_S))
        spent = self.patience.clock() - self.since
        if self.tries >= self.patience.tries or spent + pause > self.patience.seconds:
            raise self.given_up(error) from None
        while pause > 0:
            self.check()
            self.patience.sleep(min(pause, 0.5))
            pause -= 0.5

    def given_up(self, error: Exception) -> HubError:
        asked = getattr(error, "pause_s", 0.0)
        wait = f" The server asks to wait {asked:.0f} s." if asked > _LONGEST_PAUSE_S else ""
        found = f"{self.what} could not be fetched: {reason(error)} (try {self.tries}).{wait}"
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            hint = f"Check the network, and HF_ENDPOINT if it is set. {GO_ON}"
            return HubError(found, code="hub_unreachable", hint=hint)
        return HubError(found, code="hub_failing", hint=GO_ON)


def is_passing(status: int) -> bool:
    """Whether an HTTP status may be another the next time."""
    return status in (408, 425, 429) or status >= 500


def pause_asked(response: httpx2.Response) -> float:
    """Seconds the server asks to be left alone for."""
    if (limit := parse_ratelimit_headers(response.headers)) and limit.remaining == 0 and response.status_code == 429:
        return limit.reset_in_seconds + 1.0
    after = response.headers.get("Retry-After", "").strip()
    return float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
