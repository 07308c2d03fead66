"""Mutated input for every parser of `support.parsers`: one line of a DQEError, or success.

From tests/, `python -m support.fuzzing --seconds 600` goes on for that long and prints what else came; `--atheris` lets coverage choose
(https://pypi.org/project/atheris, in an environment of its own, which sees ours by `--site .venv/lib/python3.11/site-packages`).
"""

from __future__ import annotations

import argparse
import atexit
import collections
import random
import re
import resource
import site
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import TYPE_CHECKING

from support.mutations import mutated

if TYPE_CHECKING:
    from support.parsers import Parser

MOST_SECONDS = 2.0  # of processor time, for one input
MOST_GROWTH = 200 << 20


def outcome(parser: Parser, data: bytes) -> str:
    """Nothing where the parser did as it should; else what came, and the last line of ours that it came from."""
    from support.parsers import check_line

    from dqe_engine.errors import DQEError

    try:
        parser(data)
    except DQEError as error:
        try:
            check_line(error)
        except (AssertionError, UnicodeEncodeError) as problem:
            return f"message: {problem!s:.400} ({type(error).__name__} from {_place(error)})"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return f"{type(error).__name__}: {str(error)[:200]!r} from {_place(error)}"
    return ""


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dqe_" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"


class Fuzzing:
    """Parsers by name, how many inputs each has had, and the problems found: the first input of each kind."""

    def __init__(self, folder: Path, only: str = "") -> None:
        from support.parsers import parsers

        self.parsers = {name: each for name, each in parsers(folder).items() if only in name}
        self.names = list(self.parsers)
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: dict[str, bytes] = {}

    def one(self, name: str, data: bytes) -> None:
        before, clock = peak(), time.process_time()
        said = outcome(self.parsers[name][1], data)
        if (took := time.process_time() - clock) > MOST_SECONDS:
            said = f"took {took:.1f} s"
        if (grown := peak() - before) > MOST_GROWTH:
            said = f"grew by {grown >> 20} MiB"
        self.counts[name] += 1
        kind = name + re.sub(r"'.*'|[0-9]+|/[^ ]+", "", said)
        if said and kind not in self.problems:
            self.problems[kind] = data
            print(f"{name}: {said}\n    {data[:600]!r}", flush=True)

    def any(self, rng: random.Random) -> None:
        """A mutated input for any of the parsers."""
        name = rng.choice(self.names)
        self.one(name, mutated(self.parsers[name][0], rng))

    def report(self) -> None:
        total = sum(self.counts.values())
        print(f"{total} inputs, {len(self.problems)} kinds of problems, peak {peak() >> 20} MiB, {dict(self.counts)}", flush=True)


def peak() -> int:
    """Most memory that this process had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_by_coverage(fuzzing: Fuzzing, seconds: float) -> None:
    """Does not return. The first byte of an input chooses the parser."""
    import atheris

    for _, parser in fuzzing.parsers.values():
        atheris.instrument_func(parser)
    ours = [part for name, module in sys.modules.items() if name.startswith("dqe_") for part in vars(module).values()]
    for function in [each for part in ours for each in (part, *(vars(part).values() if isinstance(part, type) else ()))]:
        if isinstance(function, types.FunctionType) and function.__module__.startswith("dqe_"):
            atheris.instrument_func(function)
    names = fuzzing.names

    def test(data: bytes) -> None:
        if data:
            fuzzing.one(names[data[0] % len(names)], data[1:])

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        which = data[0] % len(names) if data else 0
        if len(data) < 3 or rng.random() < 0.02:
            which = rng.randrange(len(names))
            data = bytes([which]) + fuzzing.parsers[names[which]][0]
        if rng.random() < 0.2:
            return bytes([which]) + bytes(atheris.Mutate(data[1:], most - 1))
        return (bytes([which]) + mutated(data[1:], rng))[:most]

    atexit.register(fuzzing.report)
    limits = [f"-max_total_time={int(seconds)}", "-max_len=20000", "-timeout=60", "-rss_limit_mb=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits], test, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="parsers whose name contains this")
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--site", help="a further folder of packages")
    args = parser.parse_args()
    if args.site:
        site.addsitedir(args.site)
    with tempfile.TemporaryDirectory() as folder:
        fuzzing = Fuzzing(Path(folder), args.only)
        if args.atheris:
            fuzz_by_coverage(fuzzing, args.seconds)
        rng, started = random.Random(args.seed), time.monotonic()
        while time.monotonic() - started < args.seconds:
            fuzzing.any(rng)
        fuzzing.report()
    return bool(fuzzing.problems)


if __name__ == "__main__":
    sys.exit(main())
