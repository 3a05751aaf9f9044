"""The HTTP API beside the messages: on a free port of the loopback address, with a key that only the parent is told.

The server has a thread and a loop of its own, and stays where it is while models come and go."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..engine.engine import Engine
from ..server.app import Model, create_app
from ..server.serve import Server, allow_open_files, listening, url
from ..server.settings import ServerSettings


@dataclass(frozen=True)
class Beside:
    """A running server: where it is, and what asks for the engine that is put into `model`."""

    url: str
    key: str
    model: Model
    end: Callable[[], None]

    def use(self, engine: Engine | None) -> None:
        """Answer with this engine from now on; with None, say that there is no model."""
        self.model.engine, self.model.is_coming = engine, False

    def await_model(self, done: int = 0, total: int = 0) -> None:
        """Say that a model is being loaded, and how far that is."""
        self.model.is_coming, self.model.done, self.model.total = True, done, total


def serve_beside() -> Beside:
    """Open the API. Raises `MixtralError`."""
    settings = ServerSettings(api_key=secrets.token_urlsafe(32))
    sockets = listening(settings.host, 0, None)
    allow_open_files()
    model = Model(is_coming=False)
    server = Server(create_app(model, settings), settings)
    threading.Thread(target=server.run, args=[sockets], name="helper-http", daemon=True).start()
    return Beside(url(sockets[0], settings), settings.api_key, model, server.end)
