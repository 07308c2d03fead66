"""Keys: reading them, and finding the one that a request brings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dqe_engine.errors import InputError
from dqe_engine.server.keys import Keyring, cookies_of, expired_cookie, key_of, read_keys, session_cookie

READ, WRITE = "read-key-read-key-1", "write-key-write-key+/=2"


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    file.chmod(mode)
    return file


@pytest.fixture
def ring() -> Keyring:
    return Keyring((key_of(READ, "page"), key_of(WRITE, "ci", may_write=True)))


def test_a_file_and_the_variable_are_read(tmp_path: Path) -> None:
    file = written(tmp_path, f"# keys of the team\n\nread {READ}\twebsite # for the page\r\nwrite {WRITE}\n")
    variable = f"read {'x' * 16} a, write {'y' * 16}\nread {'z' * 16} # c"
    keys = read_keys(file, {"DQE_SERVE_KEYS": variable})
    assert [(key.name, key.may_write) for key in keys] == [
        ("website", False),
        ("key-2", True),
        ("a", False),
        ("key-4", True),
        ("key-5", False),
    ]
    assert Keyring(keys).match("y" * 16) == keys[3]


def test_no_keys_are_no_error() -> None:
    assert read_keys(None, {}) == ()
    assert read_keys(None, {"DQE_SERVE_KEYS": " , \n# nothing"}) == ()
    assert not Keyring(())


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666, 0o777])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(InputError, match="chmod 600"):
        read_keys(written(tmp_path, f"read {READ}", mode), {})


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_group_may_read(tmp_path: Path, mode: int) -> None:
    assert len(read_keys(written(tmp_path, f"read {READ}", mode), {})) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"read {READ}\nadmin {WRITE}", "line 2 is neither 'read KEY"),
        (f"read {READ}\nread", "line 2 is neither 'read KEY"),
        (f"read {READ} a b", "line 1 is neither 'read KEY"),
        (f"READ {READ}", "line 1 is neither 'read KEY"),
        ("read 123456789012345", "line 1: a key has 15 characters, expected at least 16"),
        ("read 1234567890123456ä", "line 1: a key has .*others than letters"),
        (f"read {'x' * 257}", "line 1: a key has over 256"),
        (f"read {READ} na/me", "line 1: a key's name"),
        (f"# a\nread {READ} a\nwrite {READ} b", "line 3 repeats the key of .*line 2"),
        ("# nothing\n", "has no key"),
        (b"read \xff\xfe", "no text in UTF-8"),
        (b"#" * (1 << 20) + b"#", "has over"),
    ],
)
def test_a_wrong_line_is_named_by_number_and_never_shown(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_keys(written(tmp_path, text), {})
    assert READ not in str(caught.value)
    assert "1234567890" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_key_of_the_file_and_the_variable_is_a_duplicate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"DQE_SERVE_KEYS, entry 2 repeats the key of .*line 1"):
        read_keys(written(tmp_path, f"read {READ}"), {"DQE_SERVE_KEYS": f"read {WRITE}, read {READ}"})


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        read_keys(tmp_path / "missing", {})
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="no regular file"):
        read_keys(tmp_path / "pipe", {})
    with pytest.raises(InputError, match=f"{tmp_path.name}: is a directory; expected a file"):
        read_keys(tmp_path, {})


@pytest.mark.parametrize(
    ("headers", "cookies", "name", "may_write"),
    [
        ([], {}, None, False),
        ([(b"authorization", f"Bearer {READ}".encode())], {}, "page", False),
        ([(b"authorization", f"bEARER   {WRITE} ".encode())], {}, "ci", True),
        ([(b"x-api-key", WRITE.encode())], {}, "ci", True),
        ([(b"x-api-key", b"unknown-unknown-unknown")], {}, None, False),
        ([(b"x-api-key", b"")], {}, None, False),
        ([(b"x-api-key", b"\xff\x00")], {}, None, False),
        ([(b"authorization", READ.encode())], {}, None, False),
        ([(b"authorization", b"Basic dTpw"), (b"x-api-key", READ.encode())], {}, "page", False),
        ([(b"authorization", b"Basic dTpw")], {"dqe_key": READ}, "page", False),
        # The same key twice is one; two keys are none.
        ([(b"authorization", f"Bearer {READ}".encode()), (b"x-api-key", READ.encode())], {}, "page", False),
        ([(b"authorization", f"Bearer {READ}".encode()), (b"x-api-key", WRITE.encode())], {}, None, False),
        ([(b"x-api-key", READ.encode()), (b"x-api-key", WRITE.encode())], {}, None, False),
        # A cookie reads, whatever its key may do; a header counts before it.
        ([], {"dqe_key": WRITE}, "ci", False),
        ([], {"dqe_key": "unknown-unknown-unknown"}, None, False),
        ([], {"DQE_KEY": WRITE}, None, False),
        ([(b"x-api-key", b"unknown-unknown-unknown")], {"dqe_key": WRITE}, None, False),
    ],
)
def test_the_key_that_a_request_brings(
    ring: Keyring, headers: list[tuple[bytes, bytes]], cookies: dict[str, str], name: str | None, may_write: bool
) -> None:
    key = ring.find(headers, cookies)
    assert (None if key is None else key.name) == name
    assert key is None or key.may_write is may_write


def test_every_key_is_compared_whichever_is_found(ring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bytes] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append(a), real(a, b))[1])
    for text in (READ, WRITE, "unknown-unknown-unknown"):
        compared.clear()
        ring.match(text)
        assert len(compared) == 2


@pytest.mark.parametrize(
    ("headers", "cookies"),
    [
        ([], {}),
        ([b"a=1; dqe_key=x; b"], {"a": "1", "dqe_key": "x"}),
        ([b"a=1", b"b=2=3;a=1"], {"a": "1", "b": "2=3"}),
        ([b"dqe_key=x; dqe_key=y"], {}),
        ([b"dqe_key=x", b"dqe_key=y; c=1"], {"c": "1"}),
        ([b"\xff=\xfe;;; =;=v"], {"ÿ": "þ", "": "v"}),
    ],
)
def test_cookies(headers: list[bytes], cookies: dict[str, str]) -> None:
    given = cookies_of([(b"x", b"y"), *((b"cookie", value) for value in headers)])
    assert {name: value for name, value in given.items() if name} == {name: value for name, value in cookies.items() if name}


def test_the_cookie_that_a_session_sets() -> None:
    assert session_cookie(READ, secure=False) == f"dqe_key={READ}; Path=/; HttpOnly; SameSite=Strict"
    assert session_cookie(READ, secure=True).endswith("; Secure")
    assert "Max-Age=0" in expired_cookie(secure=True)
    with pytest.raises(InputError):
        session_cookie("x" * 20 + "; Domain=evil", secure=False)
