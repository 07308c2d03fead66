"""Packages of which only one may be installed, because they write the same folder: pip does not object, and the last one wins.

Removing either breaks the other, and leaves a folder that Python imports as an empty namespace package.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .findings import Finding, Trying
from .packages import installed_of, listed

INSTALL = "pip install 'dqe-engine[cpu]', or 'dqe-engine[gpu]' on a machine with an NVIDIA GPU"


class Twins:
    """`module`, which any of `distributions` brings; it is whole if it has the attribute `mark`."""

    def __init__(self, module: str, distributions: Sequence[str], *, mark: str, install: str = INSTALL) -> None:
        self._module, self._mark, self._install = module, mark, install
        self.installed = installed_of(distributions)
        self.repair = f"pip uninstall -y {' '.join(self.installed or distributions[:2])}; then {install}"
        """What to do where the module is there and does not work."""

    @property
    def names(self) -> str:
        return listed(self.installed)

    def trying(self) -> Trying:
        return Trying("package", self.repair)

    def load(self) -> tuple[Any, Finding]:
        """The module, None where it is of no use, and what there is to say about the package. Raises what importing it raises."""
        try:
            module: Any = import_module(self._module)
        except ModuleNotFoundError as error:
            if error.name != self._module:
                raise
            module = None
        if not hasattr(module, self._mark):
            if self.installed:
                return None, Finding("package", "broken", f"{self.names} is installed, but its files are gone", self.repair)
            return None, Finding("package", "not installed", f"no {self._module}", self._install)
        version = module.__version__
        facts = {"version": version, "packages": self.installed}
        if len(self.installed) > 1:
            found = f"{self.names} are installed together and overwrite each other (the files are {version}'s)"
            return module, Finding("package", "broken", found, self.repair, facts)
        return module, Finding("package", "ok", self.names or f"{self._module} {version}, not installed by pip", facts=facts)
