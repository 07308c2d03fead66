"""What a child of `fork` must leave alone: objects that live on threads or on a device of its parent, of which it inherits neither."""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache
from typing import ClassVar, NoReturn, SupportsIndex

from .errors import BackendError, InputError

_process = object()  # another one in every child
_alive: weakref.WeakSet[ProcessBound] = weakref.WeakSet()


class NotPickled:
    """Base of what cannot be sent to another process, or copied. `instead`: what to do, as the message ends."""

    instead: ClassVar[str]

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise InputError(f"{type(self).__name__}: cannot be pickled or copied; {self.instead}")


class ProcessBound(NotPickled):
    """Base of what works in the process alone that made it. `__init__` calls `bind_to_process` once nothing can fail any more.

    In a child of `fork`, `check_process` raises, and destructors are not run: they would wait for ever for threads that are not there.
    """

    instead = "load it in the other process, from the bundle's path"
    _made_in: object
    _finalizer: weakref.finalize[..., ProcessBound] | None

    def bind_to_process(self, finalizer: weakref.finalize[..., ProcessBound] | None = None) -> None:
        """`finalizer`: what releases parts of it at the end of the process; not called in children."""
        guard_children()
        self._made_in, self._finalizer = _process, finalizer
        _alive.add(self)

    @property
    def is_at_home(self) -> bool:
        """Whether this is the process that made it."""
        return self._made_in is _process

    def check_process(self) -> None:
        """Raises BackendError in a child of the process that made this."""
        if not self.is_at_home:
            raise BackendError(
                f"this {type(self).__name__} was made before a fork, and works in the parent alone; load the engine in each worker "
                "(gunicorn: in post_fork, or without --preload; multiprocessing: in the worker, or start method 'spawn')"
            )


@cache
def guard_children() -> None:
    """From now on, children of `fork` end. To be called before ONNX Runtime is imported.

    It has threads from its import on, and at the end of a child its destructors wait for them for ever.
    """
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    """In a child: nothing that was inherited is destroyed, and the end of the process, after Python's own, is the system's alone."""
    global _process
    _process = object()
    for inherited in _alive:
        if inherited._finalizer is not None:
            inherited._finalizer.detach()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
    _alive.clear()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc; handlers run in reverse order, so this one comes before those that hang
        libc.on_exit(libc._exit, None)
