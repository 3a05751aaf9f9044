"""Who may ask a server, and how much: the limits it keeps, and which hosts and origins it knows."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..config import MixtralError


class ServerError(MixtralError):
    """A server that cannot start as it was asked to."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server is bound (`host`; empty for a Unix socket), who may ask it, and the limits it keeps.

    `aliases` are other names for the model, as patterns.

    Seconds: `headers_s` and `body_s` for a request to arrive, `idle_s` between two on a connection, `stalled_s` for a
    client to read what is ready for it, `waiting_s` between signs of life in a stream, `timeout_s` for all of it."""

    host: str = "127.0.0.1"
    api_key: str = ""
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    max_body: int = 32 << 20
    max_json_parts: int = 1 << 20
    max_headers: int = 100
    max_header_bytes: int = 32 << 10
    max_messages: int = 4096
    max_schema_bytes: int = 256 << 10
    max_connections: int = 1024
    headers_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 30.0
    stalled_s: float = 60.0
    waiting_s: float = 5.0
    timeout_s: float = 3600.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.host and not is_loopback(self.host) and not self.api_key:
            raise ServerError(
                f"The address {self.host} can be reached from other machines, and there is no key.",
                code="key_required",
                hint="Give --api-key or MIXTRAL_MLX_API_KEY, or leave out --host.",
            )
        if not self.api_key.isascii() or any(c.isspace() or not c.isprintable() for c in self.api_key):
            raise ServerError(
                "The key holds spaces, control or other than ASCII characters, which no header can carry.",
                code="bad_option",
                hint="openssl rand -hex 16 makes a good one.",
            )
        for origin in self.allow_origins:
            if origin != "null" and not _is_origin(origin):
                raise ServerError(
                    f"The origin is {origin!r}, expected scheme://host[:port], as https://app.example.",
                    code="bad_option",
                    hint="Name each origin; there is no * for all of them.",
                )
        for name in self.allow_hosts:
            if not _HOST.fullmatch(name):
                raise ServerError(
                    f"The host is {name!r}, expected a name or an address without a port.", code="bad_option"
                )


_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_HOST_AND_PORT = re.compile(rf"({_HOST.pattern})(?::([0-9]{{0,5}}))?")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`."""
    address = _address(host)
    return host.lower() == "localhost" or bool(address and address.is_loopback)


def knows_host(settings: ServerSettings, header: str) -> bool:
    """Whether a request may call the server so in its `Host`.

    A page elsewhere can make its own name lead here (DNS rebinding), but no address: so of names only those are known
    that cannot be anybody else's, or were allowed."""
    if not settings.host:
        return True  # No page gets to a Unix socket.
    if not (found := _HOST_AND_PORT.fullmatch(header)) or int(found[2] or 0) > 65535:
        return False
    name = found[1].lower().rstrip(".")
    if name in (allowed.lower() for allowed in settings.allow_hosts):
        return True
    bound, asked = _address(settings.host), _address(name)
    if is_loopback(settings.host):
        # 0.0.0.0 leads to the machine itself, and Xcode calls a local provider so.
        return is_loopback(name) or bool(asked and asked.is_unspecified)
    if bound and bound.is_unspecified:
        return is_loopback(name) or asked is not None
    return name == settings.host.lower() or (asked is not None and asked == bound)


def knows_origin(settings: ServerSettings, origin: str, host: str) -> bool:
    """Whether a page from `origin` may ask, at a server that the request calls `host`."""
    return origin == f"http://{host}" or origin in settings.allow_origins


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return (
        has_port
        and bool(parts.netloc)
        and text == f"{parts.scheme}://{parts.netloc}"
        and "@" not in text
        and "*" not in text
    )
