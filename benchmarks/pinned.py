"""An earlier commit of this repository, installed beside the present one: same interpreter, same libraries, its own kernels."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def install(commit: str, into: Path) -> Path:
    """The folder of command lines of `commit`, built once under `into`; the present environment's packages serve both.

    Raises subprocess.CalledProcessError where git or pip fail; what they say goes to this process's output.
    """
    resolve = ["git", "-C", str(_ROOT), "rev-parse", "--verify", f"{commit}^{{commit}}"]  # names move, hashes do not
    commit = subprocess.run(resolve, check=True, capture_output=True, text=True).stdout.strip()
    source, environment = into / f"{commit}-source", into / f"{commit}-env"
    commands = environment / "bin"
    done = environment / "installed"
    if done.exists():
        return commands
    into.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        subprocess.run(["git", "clone", "--quiet", str(_ROOT), str(source)], check=True)
    subprocess.run(["git", "-C", str(source), "checkout", "--quiet", commit], check=True)
    venv.create(environment, with_pip=True, clear=True)
    (found,) = environment.glob("lib/python*/site-packages")
    present = [
        entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")
    ]  # their own .pth files are not followed
    (found / "packages-of-the-present.pth").write_text("".join(f"{entry}\n" for entry in present))
    pip = [str(commands / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--editable", str(source)], check=True, stdout=sys.stderr)
    done.touch()
    return commands


def turns(versions: Mapping[str, Path], rounds: int) -> Iterator[tuple[int, str, Path]]:
    """(round, version, its folder of command lines): all versions in every round, their order reversed in every other one."""
    for number in range(rounds):
        for version in sorted(versions, reverse=bool(number % 2)):
            yield number, version, versions[version]


def present() -> Path:
    """The folder of command lines of the running version."""
    return Path(sys.executable).parent
