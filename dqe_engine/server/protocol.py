"""uvicorn's HTTP protocols, for clients that mean no good: who sends no whole head in time, sends too much of it, does not take the answer,
or opens too many connections, is dropped, and holds up nobody. `uvicorn.Config(http=ProtocolFactory(settings))`.

Bounds are each process's own. `connections` says what they are.
"""

from __future__ import annotations

import asyncio
import weakref
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .connections import Watch
from .settings import ServerSettings

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState


class ProtocolFactory:
    """What uvicorn makes a protocol with for each connection. It can be pickled, for workers."""

    def __init__(self, settings: ServerSettings, *, implementation: str | None = None) -> None:
        """`implementation`: httptools or h11; None for httptools where it is installed. Raises InputError for another name."""
        if implementation not in (None, "httptools", "h11"):
            raise InputError(f"the HTTP implementation is {implementation!r}, expected httptools or h11")
        self.settings = settings
        self.implementation = implementation or ("httptools" if find_spec("httptools") else "h11")
        self._watches: weakref.WeakKeyDictionary[ServerState, Watch] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return _factory, (self.settings, self.implementation)

    def watch(self, server_state: ServerState) -> Watch:
        """The connections of a server, in its event loop's thread."""
        found = self._watches.get(server_state)
        if found is None:
            found = self._watches[server_state] = Watch(self.settings, asyncio.get_running_loop())
        return found

    def __call__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> asyncio.Protocol:
        if self.implementation == "httptools":
            from .protocol_httptools import HttpToolsConnection

            return HttpToolsConnection(self.watch(server_state), config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        from .protocol_h11 import H11Connection

        return H11Connection(self.watch(server_state), config=config, server_state=server_state, app_state=app_state, _loop=_loop)


def _factory(settings: ServerSettings, implementation: str) -> ProtocolFactory:
    return ProtocolFactory(settings, implementation=implementation)
