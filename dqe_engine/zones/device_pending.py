"""Results of a search on a CUDA device that nobody has waited for yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dqe_engine.errors import BackendError, InputError


@contextmanager
def device_errors() -> Iterator[None]:
    """What the compiled module raises, as InputError and BackendError."""
    try:
        yield
    except ValueError as e:
        raise InputError(str(e)) from e
    except RuntimeError as e:
        raise BackendError(f"backend='cuda': {e}") from e


class Pending:
    """A search that was started with `sync=False`."""

    def __init__(self, search: Any, learn: Callable[[int], Any] | None, *given: Any) -> None:
        """search: of the compiled module. learn: gets how many tokens a screened search scored, once that is known. given: what the search
        was asked with."""
        self._search, self._learn = search, learn
        self._given = given  # after `_search`, and let go after it: an array's producer must outlive what was taken from it

    def settle(self) -> None:
        """Wait for the search, and repeat it where a list of candidates overflowed. Raises InputError for anchors outside the items,
        BackendError where the device failed; again each time."""
        with device_errors():
            self._search.settle()
        learn, self._learn, self._given = self._learn, None, ()
        if learn is not None:
            learn(self._search.rescored)


class PendingArray:
    """An array of a pending search's result. Whoever takes it through DLPack gets what is complete."""

    def __init__(self, array: Any, pending: Pending) -> None:
        self._array, self._pending = array, pending

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._array.shape
        return shape

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._array.__dlpack_device__()
        return device

    def __dlpack__(self, **options: Any) -> Any:
        """Waits for the search, and raises what it raises (`Pending.settle`)."""
        self._pending.settle()
        return self._array.__dlpack__(**options)
