"""Keys: where they are read from, and who holds the one that a request brings.

A key is an entry `read KEY [name]` or `write KEY [name]`: in a file, one a line, `#` begins a comment; or in the environment variable
DQE_SERVE_KEYS, where commas separate them as well. Keys are kept as digests.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from ..files import describe_os_error
from .settings import Key

VARIABLE = "DQE_SERVE_KEYS"
COOKIE = "dqe_key"
SHORTEST = 16
"""Characters. A key of 16 random letters and digits has 95 bits."""
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")  # what headers and cookies carry without quoting
_LARGEST_FILE = 1 << 20


def key_of(text: str, name: str, *, may_write: bool = False) -> Key:
    """The key `text`, which is not kept. Raises InputError, without naming it, where it is short or has other characters."""
    if len(text) < SHORTEST:
        raise InputError(f"a key has {len(text)} characters, expected at least {SHORTEST}; make one with: openssl rand -hex 24")
    if not _KEY.fullmatch(text):
        raise InputError(
            "a key has over 256 characters, or others than letters, digits and . _ ~ + / = -; make one with: openssl rand -hex 24"
        )
    return Key(name, may_write, _digest(text))


def read_keys(file: Path | None, environment: Mapping[str, str] | None = None) -> tuple[Key, ...]:
    """The keys of `file` and of the environment variable DQE_SERVE_KEYS (`environment`: None for the process's).

    Raises InputError for a file that cannot be read, that others may read or write or its group may write, for a wrong line, naming its
    number and none of its content, for a short key, and for a key that is there twice. The same name twice is one client with two keys,
    as when one is being replaced.
    """
    found: list[tuple[str, Key]] = []
    if file is not None:
        lines = _text_of(file).splitlines()
        found += _keys_of(((f"{file}, line {number}", line.partition("#")[0]) for number, line in enumerate(lines, 1)), len(found))
    given = (os.environ if environment is None else environment).get(VARIABLE, "")
    entries = [entry for line in given.splitlines() for entry in line.partition("#")[0].split(",")]
    found += _keys_of(((f"{VARIABLE}, entry {number}", entry) for number, entry in enumerate(entries, 1)), len(found))
    if file is not None and not found:
        raise InputError(f"{file} has no key, expected lines such as: write KEY NAME")
    first: dict[bytes, str] = {}
    for place, key in found:
        if key.digest in first:
            raise InputError(f"{place} repeats the key of {first[key.digest]}; keep one of them")
        first[key.digest] = place
    return tuple(key for _, key in found)


def cookies_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The cookies of a request, whose header may come several times. A name that comes with two values is left out."""
    cookies: dict[str, str] = {}
    doubtful = set()
    for header, value in headers:
        if header != b"cookie":
            continue
        for pair in value.decode("latin-1").split(";"):
            name, equals, content = pair.strip(" \t").partition("=")
            if equals and cookies.setdefault(name, content) != content:
                doubtful.add(name)
    return {name: content for name, content in cookies.items() if name not in doubtful}


def session_cookie(key: str, *, secure: bool) -> str:
    """The value of the header Set-Cookie that lets a browser read. `secure`: whether the client came by HTTPS.

    Raises InputError for what cannot be a key.
    """
    key_of(key, "session")
    return f"{COOKIE}={key}; Path=/; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"


def expired_cookie(*, secure: bool) -> str:
    """The value of the header Set-Cookie that ends a session."""
    return f"{COOKIE}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"


class Keyring:
    """Finds the key that a request brings, in a time that tells nothing about the keys there are."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = tuple(keys)
        self._reading = {key.digest: replace(key, may_write=False) for key in keys}

    def __bool__(self) -> bool:
        """Whether there are keys at all."""
        return bool(self._keys)

    def match(self, text: str) -> Key | None:
        """The key that `text` is."""
        digest, found = _digest(text), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def find(self, headers: Iterable[tuple[bytes, bytes]], cookies: Mapping[str, str]) -> Key | None:
        """The key of a request, None for none or an unknown one.

        `headers`: as in an ASGI scope, names in lower case. `Authorization: Bearer KEY` and `X-API-Key: KEY` count before the cookie
        `dqe_key`, whose key comes back without the right to write: browsers send cookies on their own. Headers with different keys are
        as good as none.
        """
        given = {text for name, value in headers if (text := _key_in(name, value)) is not None}
        if given:
            return self.match(given.pop()) if len(given) == 1 else None
        if COOKIE not in cookies:
            return None
        key = self.match(cookies[COOKIE])
        return None if key is None else self._reading[key.digest]


def _key_in(name: bytes, value: bytes) -> str | None:
    """The key that a header brings. Another scheme than Bearer is somebody else's: a proxy's password, say."""
    if name == b"x-api-key":
        return value.decode("latin-1").strip(" \t")
    if name == b"authorization" and value[:7].lower() == b"bearer ":
        return value[7:].decode("latin-1").strip(" \t")
    return None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _text_of(file: Path) -> str:
    """What is checked is what is read: the open file."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{file} is no regular file; put the keys into one")
            if status.st_mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
                raise InputError(f"{file} may be read by others, or written by others or its group; run: chmod 600 {file}")
            content = stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"the keys cannot be read: {describe_os_error(error, file)}") from error
    if len(content) > _LARGEST_FILE:
        raise InputError(f"{file} has over {_LARGEST_FILE} bytes, expected lines such as: write KEY NAME")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{file} is no text in UTF-8, expected lines such as: write KEY NAME") from None  # the error holds the content


def _keys_of(entries: Iterable[tuple[str, str]], before: int) -> list[tuple[str, Key]]:
    """(place, key) of each. `before`: keys that there are already; a key without a name is called by its position among all."""
    found: list[tuple[str, Key]] = []
    for place, entry in entries:
        words = entry.split()
        if not words:
            continue
        if len(words) > 3 or len(words) < 2 or words[0] not in ("read", "write"):
            raise InputError(f"{place} is neither 'read KEY [NAME]' nor 'write KEY [NAME]'; correct it")
        name = words[2] if len(words) == 3 else f"key-{before + len(found) + 1}"
        try:
            found.append((place, key_of(words[1], name, may_write=words[0] == "write")))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    return found
