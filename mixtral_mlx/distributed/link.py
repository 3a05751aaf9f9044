"""What ranks say to each other beside their sums: who they are, what is to be done next, and that they are alive.

Every rank has a TCP connection to rank 0, and in a ring to its neighbours, made before MLX's own, at the addresses that
MLX will use: there is no other port to choose or to open, and a link that is cut is noticed by those at its ends. Knows
nothing of models. Messages are lines of JSON."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

from .split import DistributedError

START_S = 60.0
"""So long ranks wait for each other at the start."""
BEAT_S = 1.0
LOST_S = 6.0
"""A rank that has not been heard of for so long is lost."""
_REFUSE_S = 3.0  # Ranks that come so late are still told that all was refused.
_RETRY_S = 0.1
_MOST_MESSAGE_BYTES = 64 << 20

_COORDINATOR = "MLX_JACCL_COORDINATOR"

Message = dict[str, Any]
Backend = Literal["ring", "jaccl"]


@dataclass(frozen=True)
class Place:
    """Which rank this process is, of how many, by which of MLX's backends they are joined, and where ranks are reached:
    all of them in a ring, with jaccl rank 0 alone."""

    rank: int
    size: int
    addresses: tuple[tuple[str, int], ...]
    backend: Backend = "ring"

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> Place | None:
        """As `mlx.launch` says; None where it did not start this process, or only this one."""
        if "MLX_RANK" not in environment:
            return None
        backend: Backend = "jaccl" if _COORDINATOR in environment else "ring"
        variable = "MLX_IBV_DEVICES" if backend == "jaccl" else "MLX_HOSTFILE"
        path = environment.get(variable)
        if not path:
            raise DistributedError(
                f"MLX_RANK is set and {variable} is not.",
                code="bad_hostfile",
                hint="Use mlx.launch --backend ring, or jaccl.",
            )
        try:
            with open(path) as file:
                hosts = json.load(file)
            first = [[environment[_COORDINATOR]]] if backend == "jaccl" else hosts
            addresses = tuple(_address(host[0]) for host in first)
            place = cls(int(environment["MLX_RANK"]), len(hosts), addresses, backend)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DistributedError(
                f"{path} is not what mlx.launch writes for a {backend} ({error}).", code="bad_hostfile"
            ) from None
        if not 0 <= place.rank < place.size:
            raise DistributedError(
                f"This is rank {place.rank} and {path} has {place.size} hosts.",
                code="bad_hostfile",
                hint="Give every Mac the same hostfile.",
            )
        return place if place.size > 1 else None


def _address(text: str) -> tuple[str, int]:
    host, _, port = str(text).rpartition(":")
    if not host:
        raise ValueError(f"{text!r} is no address")
    return host, int(port)


class Link:
    """This rank's connections: rank 0 has one to each other rank, the others to rank 0 and in a ring to neighbours.

    Made by `meet`. `on_lost` is called once, on a thread of the link's, with what befell another rank."""

    def __init__(self, place: Place, sockets: Mapping[int, socket.socket]) -> None:
        self.place = place
        self.on_lost: Callable[[DistributedError], object] = lambda error: None
        self.lost: DistributedError | None = None
        self._closing = False
        self._is_lost = threading.Event()
        self._lock = threading.Lock()
        self._peers = {rank: _Peer(rank, one, self) for rank, one in sorted(sockets.items())}
        # Not before all are there: what they hear is noted here.
        for peer in self._peers.values():
            peer.start()

    def tell(self, message: Message) -> None:
        """Say something to all other ranks, or from one of these to rank 0."""
        for rank, peer in self._peers.items():
            if self.place.rank == 0 or rank == 0:
                peer.send(message)

    def hear(self, rank: int = 0, timeout_s: float | None = None) -> Message | None:
        """The next message of a rank; None once it has said that it leaves. Raises `DistributedError` if it is lost."""
        try:
            message = self._peers[rank].messages.get(timeout=timeout_s)
        except Empty:
            raise DistributedError(f"Rank {rank} says nothing.", code="rank_lost") from None
        if isinstance(message, DistributedError):
            raise message
        return message

    def hear_all(self) -> list[Message]:
        """A message of every other rank, in their order. Raises `DistributedError` if one is lost, or leaves."""
        return [self._heard_from(rank) for rank in self._peers]

    def _heard_from(self, rank: int) -> Message:
        if (message := self.hear(rank)) is None:
            raise DistributedError(f"Rank {rank} has left.", code="rank_lost")
        return message

    def lose(self, error: DistributedError) -> None:
        """Something has happened after which the ranks cannot go on: tell the others, and whoever waits here."""
        with self._lock:
            if self._closing or self.lost:
                return
            self.lost = error
        self._is_lost.set()
        for peer in self._peers.values():
            peer.send({"lost": str(error), "code": error.code, "hint": error.hint})
            peer.messages.put(error)
        self.on_lost(error)

    @property
    def is_over(self) -> bool:
        """Whether rank 0 has left in good order."""
        return self._closing

    def why(self, error: BaseException, told: DistributedError) -> BaseException:
        """What to raise for a step that has failed with `error`: the loss of a rank, where that was the reason.

        Otherwise the others are `told`, who wait in the middle of that step and cannot be called back."""
        # MLX notices that a connection is gone as well, perhaps a moment earlier.
        self._is_lost.wait(BEAT_S)
        if self.lost:
            return self.lost
        self.lose(told)
        return error

    def close(self) -> None:
        """Leave in good order: the others are told."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for peer in self._peers.values():
            if not self.lost:
                peer.send({"bye": True})
            peer.close()

    def heard(self, rank: int, message: Message) -> None:
        """A message has come."""
        if "lost" in message:
            self.lose(DistributedError(message["lost"], code=message["code"], hint=message["hint"]))
        elif "bye" in message:
            self._closing = True
            self._peers[rank].messages.put(None)
        elif "beat" not in message:
            self._peers[rank].messages.put(message)


class _Peer:
    """The connection to another rank, with a thread that listens and one that says that this rank is alive."""

    def __init__(self, rank: int, connection: socket.socket, link: Link) -> None:
        self.rank = rank
        self.messages: SimpleQueue[Message | DistributedError | None] = SimpleQueue()
        self._connection = connection
        self._link = link
        self._lock = threading.Lock()
        self._ended = threading.Event()
        connection.settimeout(BEAT_S)

    def start(self) -> None:
        """Begin to listen, and to say that this rank is alive."""
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name="mixtral-link", daemon=True).start()

    def send(self, message: Message) -> None:
        data = _encoded(message)
        with suppress(OSError), self._lock:  # Whoever listens finds out what the matter is.
            deadline = time.monotonic() + LOST_S
            while data and time.monotonic() < deadline:
                with suppress(TimeoutError):
                    data = data[self._connection.send(data) :]

    def close(self) -> None:
        self._ended.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self.send({"beat": True})

    def _listen(self) -> None:
        try:
            self._listen_to_the_end()
        finally:
            self._connection.close()

    def _listen_to_the_end(self) -> None:
        buffer, heard_at = bytearray(), time.monotonic()
        while not self._ended.is_set():
            try:
                data = self._connection.recv(1 << 16)
            except TimeoutError:
                if time.monotonic() - heard_at > LOST_S:
                    self._lost(f"has not been heard of for {LOST_S:.0f} seconds")
                    return
                continue
            except OSError as error:
                self._lost(f"cannot be reached ({error.strerror or error})")
                return
            if not data:
                self._lost("has ended")
                return
            heard_at = time.monotonic()
            buffer += data
            try:
                while (end := buffer.find(b"\n")) >= 0:
                    self._link.heard(self.rank, json.loads(buffer[:end]))
                    del buffer[: end + 1]
                if len(buffer) > _MOST_MESSAGE_BYTES:
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                self._lost("says what cannot be understood")
                return

    def _lost(self, how: str) -> None:
        self._ended.set()
        self._link.lose(
            DistributedError(
                f"Rank {self.rank} {how}.",
                code="rank_lost",
                hint="See what that machine says, and start all of them again.",
            )
        )


# Meeting.


def meet(place: Place, about: Mapping[str, str], *, start_s: float = START_S) -> Link:
    """Connect to the other ranks, which must say the same of themselves as `about` does.

    Raises `DistributedError` on every rank where they do not, naming the first thing in which they differ."""
    deadline = time.monotonic() + start_s
    hello = {"rank": place.rank, "about": {"world size": str(place.size), **about}}
    return _welcoming(place, hello, deadline) if place.rank == 0 else _asking(place, hello, deadline)


def _welcoming(place: Place, hello: Message, deadline: float) -> Link:
    found: dict[int, socket.socket] = {}
    with _listening(place.addresses[0]) as listener:
        while len(found) < place.size - 1:
            try:
                connection, message = _accepted(listener, deadline)
                _check(hello, message, found)
            except DistributedError as error:
                come = [*found.values(), *([connection] if error.code != "rank_missing" else [])]
                _refuse(listener, come, place.size - 1, error)
                raise
            found[message["rank"]] = connection
    # MLX is to listen there now, and nobody tries before being told.
    for connection in found.values():
        connection.sendall(_encoded({"welcome": True}))
    return Link(place, found)


def _listening(address: tuple[str, int]) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise DistributedError(
            f"This rank cannot listen at {address[0]}:{address[1]}: {error.strerror}.",
            code="bad_hostfile",
            hint="That address in the hostfile is to be one of this machine's, with a free port.",
        ) from None
    return listener


def _accepted(listener: socket.socket, deadline: float) -> tuple[socket.socket, Message]:
    """A rank that has come, and its hello; whoever is none is sent away."""
    while True:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise _missing("not all ranks have come") from None
        try:
            message = _read_line(connection, min(deadline, time.monotonic() + LOST_S))
            if isinstance(message.get("rank"), int) and isinstance(message.get("about"), dict):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection, message
        except (OSError, ValueError):
            pass
        connection.close()


_ALIKE = {"chip": "Use --parallel pipeline, where machines of any kind work together."}


def _check(mine: Message, theirs: Message, found: Mapping[int, socket.socket]) -> None:
    rank = theirs["rank"]
    for name, value in mine["about"].items():
        other = str(theirs["about"].get(name, "none"))
        if other != value:
            raise DistributedError(
                f"Rank {rank} has the {name} {other[:200]}, and rank 0 has {value[:200]}.",
                code=f"{name.replace(' ', '_')}_mismatch",
                hint=_ALIKE.get(name, "Start every rank with the same program, model and options."),
            )
    if rank in found or rank == 0:
        raise DistributedError(f"There are two ranks {rank}.", code="bad_hostfile")


def _refuse(listener: socket.socket, waiting: list[socket.socket], others: int, error: DistributedError) -> None:
    """Tell those of the `others` that have come, and those that come soon, why nothing will come of it."""
    refusal = _encoded({"refused": str(error), "code": error.code, "hint": error.hint})
    deadline = time.monotonic() + _REFUSE_S
    with suppress(DistributedError):
        while True:
            for connection in waiting:
                with suppress(OSError):
                    connection.sendall(refusal)
                connection.close()
            others -= len(waiting)
            if others <= 0:
                return
            waiting = [_accepted(listener, deadline)[0]]


def _asking(place: Place, hello: Message, deadline: float) -> Link:
    rank, last = place.rank, place.size - 1
    if place.backend != "ring":
        return Link(place, {0: _asked(place, 0, hello, deadline)})
    # Before rank 0 has been asked, since the rank before this one comes as soon as rank 0 has answered.
    listener = _listening(place.addresses[rank]) if rank > 1 else None
    found = {0: _asked(place, 0, hello, deadline)}
    try:
        if rank < last:
            found[rank + 1] = _asked(place, rank + 1, hello, deadline)
        if listener:
            found[rank - 1], _ = _accepted(listener, deadline)
            listener.close()
            found[rank - 1].sendall(_encoded({"welcome": True}))
    except (OSError, DistributedError):
        found[0].close()  # Which rank 0 takes note of.
        raise _missing("a neighbour in the ring cannot be reached") from None
    return Link(place, found)


def _asked(place: Place, rank: int, hello: Message, deadline: float) -> socket.socket:
    """A connection to a rank that has welcomed this one."""
    connection = _connected(place.addresses[rank], rank, deadline)
    try:
        connection.sendall(_encoded(hello))
        answer = _read_line(connection, deadline)
    except (OSError, ValueError):
        connection.close()
        raise _missing(f"rank {rank} has gone away, or not all ranks have come") from None
    if "refused" in answer:
        connection.close()
        raise DistributedError(answer["refused"], code=answer["code"], hint=answer["hint"])
    return connection


def _connected(address: tuple[str, int], rank: int, deadline: float) -> socket.socket:
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(deadline - time.monotonic(), _RETRY_S))
        except OSError:
            if time.monotonic() > deadline:
                raise _missing(f"rank {rank} does not answer at {address[0]}:{address[1]}") from None
            time.sleep(_RETRY_S)
            continue
        if connection.getsockname() == connection.getpeername():
            connection.close()  # Nobody listened, and the system gave this end the very port it asked for.
            continue
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def _missing(what: str) -> DistributedError:
    return DistributedError(
        f"The ranks have not met: {what}.",
        code="rank_missing",
        hint="See what the others say. Every machine needs the same hostfile and must reach the first address in it.",
    )


def _read_line(connection: socket.socket, deadline: float) -> Message:
    data = bytearray()
    while not data.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        # A byte at a time: what follows the line is for whoever listens next.
        if not (byte := connection.recv(1)) or len(data) > 1 << 16:
            raise ConnectionError("The connection was closed.")
        data += byte
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message


def _encoded(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
