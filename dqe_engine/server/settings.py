"""`ServerSettings`: everything that a server is started with, checked once; and `Key`, a key that it knows."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError

_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")


@dataclass(frozen=True)
class Key:
    """A key of the server, known by its digest alone.

    `name`: what logs, metrics and rates call its holder. `digest`: SHA-256 of the key, 32 bytes; it is in no representation.
    """

    name: str
    may_write: bool
    digest: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not _KEY_NAME.fullmatch(self.name):
            raise InputError("a key's name has other characters, or is too long; expected 1 to 64 of letters, digits and . _ -")
        if len(self.digest) != 32:
            raise InputError(f"expected the 32 bytes of a SHA-256 digest, got {len(self.digest)}; use keys.key_of")


@dataclass(frozen=True)
class ServerSettings:
    """Everything that a server is started with. It can be pickled, so each worker gets the same.

    What is served:
        `bundle`, `index`: their folders. `photos`: (prefix of ids, folder) of the images that are shown. `uploads`: the folder of images
        that came by HTTP; None for `uploads_folder`'s. `provider`, `threads`: as in `RetrievalEngine.load`, of each worker; with several
        workers, None shares the processors out among them. `devices`: numbers of the CUDA devices on which each worker searches a copy of
        the index, made anew when the index changes; on the CPU where there are none.
    To whom:
        `keys`: without any, nobody may write and everybody may read. `host`, `port`: where it listens. `hosts`: names that the Host header
        may have besides those of a loopback address; where the server is bound to another address and none is given, any. `proxies`:
        addresses whose X-Forwarded-For and X-Forwarded-Proto are believed.
    How much, each worker for itself:
        `most`, `room`: as in `RetrievalEngine.batcher`. `max_body_bytes`: of a request; `max_arriving_bytes`: of all at a time. `rate`:
        requests a second that a client may send on average, None for any number; `burst`: at once, None for `burst_size`'s.
    How long, in seconds:
        `deadline_s`: for an answer, where the request names no time. `body_timeout_s`: for the whole body to arrive. `drain_s`: for
        requests to end after SIGTERM.
    Connections:
        `head_timeout_s` for a request's line and headers, `max_head_bytes` of them, `keep_alive_s` between requests, `send_timeout_s`
        without a byte of the answer taken, `max_connections` in all, and `max_connections_per_peer` from one address.
    Processes:
        `workers`: how many. `state`: folder of this run, for what they tell each other; None for one process alone. `log`: the least level
        that is logged: info (each request), warning or error.
    """

    bundle: Path
    index: Path
    photos: tuple[tuple[str, Path], ...] = ()
    uploads: Path | None = None
    keys: tuple[Key, ...] = ()
    provider: str = "auto"
    threads: int | None = None
    devices: tuple[int, ...] = ()
    most: int = 32
    room: int = 256
    max_body_bytes: int = 12 << 20
    max_arriving_bytes: int = 512 << 20
    rate: float | None = None
    burst: float | None = None
    deadline_s: float = 10.0
    drain_s: float = 30.0
    body_timeout_s: float = 20.0
    hosts: tuple[str, ...] = ()
    workers: int = 1
    state: Path | None = None
    log: str = "info"
    host: str = "127.0.0.1"
    port: int = 8000
    proxies: tuple[str, ...] = ()
    head_timeout_s: float = 10.0
    max_head_bytes: int = 32 << 10
    keep_alive_s: float = 15.0
    send_timeout_s: float = 30.0
    max_connections: int = 1000
    max_connections_per_peer: int = 100

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be meant. Files and folders are not looked at: who opens them says what is wrong with them."""
        for name in ("bundle", "index"):
            _expect(isinstance(getattr(self, name), Path), name, getattr(self, name), "a path")
        for name in ("uploads", "state"):
            _expect(isinstance(getattr(self, name), Path | None), name, getattr(self, name), "a path or None")
        for entry in self.photos:
            whole = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], Path)
            _expect(whole, "photos", entry, "pairs of a prefix and a folder")
        _expect(
            all(isinstance(key, Key) for key in self.keys),
            "keys",
            f"{len(self.keys)} entries",
            "instances of Key; read them with keys.read_keys",
        )
        digests = {key.digest for key in self.keys}
        repeated = len(self.keys) - len(digests)
        _expect(not repeated, "keys", f"a list that repeats {repeated}", "each key once; remove the others")
        _expect(self.log in ("info", "warning", "error"), "log", self.log, "info, warning or error")
        for name, least, most in (
            ("most", 1, 4096),
            ("room", 1, 1 << 20),
            ("max_body_bytes", 1024, 1 << 31),
            ("max_arriving_bytes", 1024, 1 << 40),
            ("workers", 1, 256),
            ("port", 0, 65535),
            ("max_head_bytes", 1024, 1 << 20),
            ("max_connections", 1, 1 << 20),
            ("max_connections_per_peer", 1, 1 << 20),
        ):
            _whole(name, getattr(self, name), least, most)
        if self.threads is not None:
            _whole("threads", self.threads, 1, 4096)
        for name, longest in (
            ("deadline_s", 600.0),
            ("drain_s", 3600.0),
            ("body_timeout_s", 3600.0),
            ("head_timeout_s", 600.0),
            ("keep_alive_s", 3600.0),
            ("send_timeout_s", 3600.0),
        ):
            _seconds(name, getattr(self, name), longest)
        for name in ("rate", "burst"):
            if getattr(self, name) is not None:
                _seconds(name, getattr(self, name), 1e9)
        _expect(self.burst is None or self.rate is not None, "burst", self.burst, "a rate as well, or neither")
        _expect(self.burst is None or self.burst >= 1, "burst", self.burst, "at least 1, else no request ever passes")
        _expect(bool(self.host), "host", self.host, "an address or a name to listen at, such as 127.0.0.1")
        object.__setattr__(self, "hosts", tuple(map(_host_name, self.hosts)))
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError as error:
                raise InputError(f"proxies has {proxy!r}, expected addresses such as 10.0.0.7 or 10.0.0.0/24") from error

    @property
    def uploads_folder(self) -> Path:
        """`uploads`, or INDEX.uploads beside the index."""
        return uploads_beside(self.index) if self.uploads is None else self.uploads

    @property
    def progress_file(self) -> Path | None:
        """Of the process that indexes the photos, if there is one."""
        return None if self.state is None else self.state / "indexing.json"

    @property
    def burst_size(self) -> float:
        """`burst`, or what comes in five seconds at `rate`, and no less than 100: a page asks for many pictures at once."""
        return max(100.0, 5 * (self.rate or 0)) if self.burst is None else self.burst

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the server, so that a Host header with another name is a trick (DNS rebinding)."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def allowed_hosts(self) -> frozenset[str] | None:
        """Names that a Host header may have, without a port, in lower case; None for any."""
        if self.on_loopback:
            return frozenset(("localhost", "127.0.0.1", "[::1]", *self.hosts))
        return frozenset(self.hosts) or None


def uploads_beside(index: Path) -> Path:
    """INDEX.uploads: where the images of added items are, unless it was said."""
    return index.with_name(f"{index.name}.uploads")


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r}, expected {expected}")


def _whole(name: str, value: object, least: int, most: int) -> None:
    holds = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    _expect(holds, name, value, f"a whole number from {least} to {most}")


def _seconds(name: str, value: object, most: float) -> None:
    holds = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= most
    _expect(holds, name, value, f"a number above 0, and at most {most:g}")


def _host_name(given: str) -> str:
    """As `allowed_hosts` has it."""
    name = given.lower().removesuffix(".") if isinstance(given, str) else ""
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        _expect(
            bool(_HOST_NAME.fullmatch(name)) and len(name) <= 253,
            "hosts",
            given,
            "names alone, without http:// and port: search.example.org",
        )
        return name
    return f"[{address.compressed}]" if address.version == 6 else str(address)
