"""The entry of the compiled module, which an installation may lack."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from dqe_engine.errors import BackendError


class Made:
    """What the kernels have made of somebody's arrays, None before. A copy, pickled or not, has none and makes its own."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def __reduce__(self) -> tuple[type[Made], tuple[()]]:
        return Made, ()


def kernels() -> ModuleType:
    """The compiled kernels. Raises BackendError where they are not built."""
    if not built():
        raise BackendError("backend='cpu': dqe_engine._kernels is not built; install with pip install -e ., or use 'reference'")
    from dqe_engine import _kernels

    return _kernels


def screens_panels() -> bool:
    """Whether a screen makes many queries faster on this processor, not only a few. Raises BackendError as `kernels`."""
    compiled = kernels()
    return bool(compiled.screened_queries(compiled.instruction_sets()[0]) > compiled.MAX_ROW_QUERIES)


@cache
def built() -> bool:
    return find_spec("dqe_engine._kernels") is not None
