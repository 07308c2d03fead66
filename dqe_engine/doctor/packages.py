"""Installed distributions by their metadata: nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

DISTRIBUTION = "dqe-engine"


@dataclass(frozen=True, slots=True)
class Requirement:
    name: str
    oldest: str
    """Version, "" for any."""

    @property
    def installed(self) -> str | None:
        return version_of(self.name)

    @property
    def too_old(self) -> bool:
        return self.installed is not None and _numbers(self.installed) < _numbers(self.oldest)

    def __str__(self) -> str:
        return f"{self.name} {self.installed or 'missing'}" + (f" (needs {self.oldest})" if self.too_old else "")


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_of(names: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    return {name: version for name in names if (version := version_of(name)) is not None}


def listed(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def requirements(extra: str | None = None) -> list[Requirement]:
    """What this project needs, always (None) or for an extra; raises PackageNotFoundError where it is not installed."""
    return list(dict.fromkeys(_requirements(extra)))


def _requirements(extra: str | None) -> Iterator[Requirement]:
    for line in metadata.requires(DISTRIBUTION) or ():
        text, _, marker = line.partition(";")
        wanted = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", marker)
        if (wanted[1] if wanted else None) != extra:
            continue
        name = re.match(r"[\w.-]+", text.strip())
        assert name is not None, line
        if name[0] == DISTRIBUTION:  # an extra that includes another: dqe-engine[train]
            for other in re.findall(r"\[([\w-]+)\]", text):
                yield from _requirements(other)
        else:
            oldest = re.search(r">=\s*([\w.]+)", text)
            yield Requirement(name[0], oldest[1] if oldest else "")


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
