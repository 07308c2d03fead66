"""`ServerSettings` and `Key`."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from dqe_engine.errors import InputError
from dqe_engine.server.keys import key_of
from dqe_engine.server.settings import Key, ServerSettings


def settings(**given: Any) -> ServerSettings:
    return ServerSettings(Path("bundle"), Path("data/index"), **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bundle", "text"),
        ("photos", (("a", "b"),)),
        ("photos", ("ab",)),
        ("keys", ("read abc",)),
        ("keys", (key_of("k" * 16, "a"), key_of("k" * 16, "b"))),
        ("threads", 0),
        ("most", 0),
        ("most", True),
        ("most", 1.0),
        ("room", -1),
        ("max_body_bytes", 10),
        ("rate", 0),
        ("rate", float("nan")),
        ("burst", 3),
        ("deadline_s", float("inf")),
        ("deadline_s", 601),
        ("body_timeout_s", 0),
        ("hosts", ("http://a.org",)),
        ("hosts", ("a.org:80",)),
        ("hosts", ("",)),
        ("hosts", ("a b",)),
        ("workers", 0),
        ("host", ""),
        ("port", 65536),
        ("proxies", ("everywhere",)),
        ("max_connections", 0),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"{name} (is|has) .*expected"):
        dataclasses.replace(settings(), **{name: value})  # type: ignore[arg-type]


def test_a_burst_below_one_lets_nothing_pass() -> None:
    with pytest.raises(InputError, match="burst"):
        settings(rate=1.0, burst=0.5)


def test_what_is_left_out_follows_from_the_rest() -> None:
    assert settings().uploads_folder == Path("data/index.uploads")
    assert settings(uploads=Path("u")).uploads_folder == Path("u")
    assert settings(rate=1.0).burst_size == 100
    assert settings(rate=100.0).burst_size == 500
    assert settings(rate=100.0, burst=3.0).burst_size == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "::1", "[::1]", "127.9.9.9"])
def test_a_loopback_server_has_the_loopback_names_and_those_given(host: str) -> None:
    assert settings(host=host).allowed_hosts == {"localhost", "127.0.0.1", "[::1]"}
    assert settings(host=host, hosts=("Box.lan.",)).allowed_hosts == {"localhost", "127.0.0.1", "[::1]", "box.lan"}


def test_a_public_server_has_the_names_given_or_any() -> None:
    assert settings(host="0.0.0.0").allowed_hosts is None
    assert settings(host="::", hosts=("A.org", "2001:DB8::0:1")).allowed_hosts == {"a.org", "[2001:db8::1]"}


def test_settings_reach_workers_and_show_no_key() -> None:
    given = settings(keys=(key_of("secret-secret-secret", "ci", may_write=True),))
    assert pickle.loads(pickle.dumps(given)) == given
    assert "secret" not in repr(given)
    assert repr(given.keys[0].digest) not in repr(given)
    assert b"secret-secret" not in pickle.dumps(given)


@pytest.mark.parametrize(
    ("name", "digest"), [("", b"0" * 32), ("a b", b"0" * 32), ("x" * 65, b"0" * 32), ("a\n", b"0" * 32), ("a", b"0" * 31)]
)
def test_a_key_has_a_plain_name_and_a_whole_digest(name: str, digest: bytes) -> None:
    with pytest.raises(InputError):
        Key(name, False, digest)
