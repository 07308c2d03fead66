"""Standard streams of any encoding, closed, full, or with nobody at their other end: a command does its work and says what it can."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from support.mining_workers import problem
from support.samples import noise_image
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.cli import index, mine, search
from dqe_engine.cli.main import run
from dqe_engine.cli.streams import prepare_streams

ROOT = Path(__file__).parents[1]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8")


def main_of(entry: str) -> Callable[[Sequence[str]], int]:
    module, _, function = entry.partition(":")
    return getattr(import_module(module), function)


class Stdout(io.TextIOWrapper):
    """As the interpreter makes it from PYTHONIOENCODING."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding, errors="strict")

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@contextmanager
def stdout_in(encoding: str) -> Iterator[Stdout]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Stdout(encoding))
        yield sys.stdout


in_every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, an index with an id that is not ASCII, and mined negatives."""
    root = tmp_path_factory.mktemp("workspace")
    build_tiny_bundle(root / "bundle")
    (root / "images").mkdir()
    for seed, name in enumerate(("rot", "grün", "藍色")):
        noise_image(seed).save(root / "images" / f"{name}.png")
    (root / "mining").mkdir()
    arrays = problem()
    for name, key in (("queries", "queries"), ("gallery", "items"), ("targets", "targets")):
        np.save(root / "mining" / f"{name}.npy", arrays[key])
    assert (
        index.main([str(root / "bundle"), str(root / "images"), "--out", str(root / "index"), "--provider", "cpu", "--threads", "1"]) == 0
    )
    assert mine.main([str(root / "mining"), "--out", str(root / "mined")]) == 0
    return root


def search_arguments(workspace: Path, *more: str) -> list[str]:
    query = ["--image", str(workspace / "images" / "rot.png"), "--text", "red", "--provider", "cpu", "--threads", "1"]
    return [str(workspace / "bundle"), str(workspace / "index"), *query, *more]


# -- encodings -------------------------------------------------------------------------------------------------------------


@in_every_encoding
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, encoding: str) -> None:
    with stdout_in(encoding) as stdout, pytest.raises(SystemExit) as caught:
        main_of(SCRIPTS[script])(["--help"])
    assert caught.value.code == 0
    assert stdout.text().startswith(f"usage: {script}")


@in_every_encoding
def test_tables(workspace: Path, encoding: str) -> None:
    with stdout_in(encoding) as stdout:
        assert search.main(search_arguments(workspace)) == 0
        assert search.main(search_arguments(workspace, "--zones")) == 0
        assert mine.main(["--show", str(workspace / "mined")]) == 0
    text = stdout.text()
    assert ("Δ" if encoding == "utf-8" else "\\u0394") in text
    assert "rot.png" in text
    assert {"utf-8": "grün", "latin-1": "grün", "cp1252": "grün", "ascii": "gr\\u00fcn"}[encoding] in text


@in_every_encoding
def test_json_stays_json(workspace: Path, encoding: str) -> None:
    with stdout_in(encoding) as stdout:
        assert search.main(search_arguments(workspace, "--json")) == 0
    assert {hit["id"] for hit in json.loads(stdout.text())["hits"]} == {"rot.png", "grün.png", "藍色.png"}


def test_escapes() -> None:
    with stdout_in("latin-1") as stdout:
        prepare_streams()
        print("é × Δ 👗 \udcff", end="")
    stdout.flush()
    assert stdout.buffer.getvalue() == b"\xe9 \xd7 \\u0394 \\ud83d\\udc57 \xff"
    assert json.loads('"\\u0394 \\ud83d\\udc57"') == "Δ 👗"


def test_a_handler_that_was_chosen_stays() -> None:
    with stdout_in("ascii") as stdout:
        stdout.reconfigure(errors="replace")
        prepare_streams()
    assert stdout.errors == "replace"


# -- streams of real processes ---------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Output held back until it is flushed, as is usual; PYTHONUNBUFFERED is set in many containers."""
    here = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | here


def start(command: str, arguments: Sequence[str], redirections: str, *, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, its streams redirected by a shell."""
    code = f"import sys; from dqe_engine.cli.{command} import main; sys.exit(main())"
    return subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {redirections}', sys.executable, "-c", code, *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip


COMMANDS = {"mine": ["--show", "{}/mined"], "search": [], "heads": ["--help"]}
"""What prints a table, what prints a table of rich's, and argparse."""


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, workspace: Path) -> tuple[str, list[str]]:
    arguments = [part.format(workspace) for part in COMMANDS[request.param]]
    return request.param, arguments or search_arguments(workspace)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stdout(command: tuple[str, list[str]]) -> None:
    done = start(*command, "> /dev/full")
    assert done.returncode == 2
    assert done.stderr == "error: no space left on device; free some space, then run the same command again\n"


def test_a_reader_that_has_gone(command: tuple[str, list[str]], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = start(*command, "", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(command: tuple[str, list[str]], closed: str) -> None:
    done = start(*command, closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed in ("2>&-", "<&-"))


@pytest.mark.parametrize("closed", ["2>&-", "2> /dev/full"])
def test_an_error_that_nobody_hears(closed: str, tmp_path: Path) -> None:
    done = start("heads", [str(tmp_path / "none"), str(tmp_path)], closed)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library writes to file descriptor 2 must not land in a file that happens to be open under that number."""
    code = (
        "import os, sys; from dqe_engine.cli.main import run\n"
        "def work():\n"
        "    with open(sys.argv[1], 'wb') as stream:\n"
        "        os.write(1, b'noise'), os.write(2, b'noise'), stream.write(b'data')\n"
        "    return 0\n"
        "sys.exit(run(work))"
    )
    shell = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(shell, env=environment(), timeout=60, check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"data"


# -- errors of the system --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b: permission denied; grant this user access to it, or run as its owner"),
        (FileNotFoundError(2, "No such file or directory", "a"), "a: no such file or directory; check the path"),
        (OSError(28, "No space left on device"), "no space left on device; free some space, then run the same command again"),
        (OSError(110, "Connection timed out"), "connection timed out"),
        (OSError("in a library's\n own words"), "in a library's own words"),
        (FileExistsError("a exists already"), "a exists already"),
    ],
)
def test_errors_of_the_system_are_one_line(error: OSError, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def handler() -> int:
        raise error

    assert run(handler) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
