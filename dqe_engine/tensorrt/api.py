"""TensorRT's Python API: imported on demand, one of the versions this is written for, with a log that can be read back."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from ..errors import BackendError, DQEError

SUPPORTED_MAJORS = (10, 11)
_KEPT_LINES = 5000  # the last ones: a build writes some hundred, a broken one may repeat itself
_KEPT_ERRORS = 20  # the first ones: what comes after follows from them


class Logger(Protocol):
    """`trt.ILogger` that keeps what it is told."""

    @property
    def lines(self) -> list[str]:
        """The last lines logged, the oldest first, without the verbose ones."""
        ...

    def errors(self) -> str:
        """The errors logged since this was last asked, in one line, "no message" without any."""
        ...


def import_tensorrt() -> Any:
    """The `tensorrt` module. Raises BackendError where it is missing, has no libraries, or is of another major version."""
    try:
        import tensorrt
    except Exception as error:  # without its libraries it raises whatever dlopen said, and what does not fit its version anything
        reason = " ".join(str(error).split())
        raise BackendError(
            f"tensorrt cannot be imported ({reason}); pip install 'dqe-engine[tensorrt]', or choose another provider"
        ) from error
    version = str(getattr(tensorrt, "__version__", "unknown"))
    if not version.startswith(tuple(f"{major}." for major in SUPPORTED_MAJORS)):
        raise BackendError(f"TensorRT {version} is installed, expected version 10 or 11; pip install 'dqe-engine[tensorrt]'")
    return tensorrt


def make_logger(trt: Any) -> Logger:
    """A logger for everything made from it. It must outlive those objects."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base is known only once TensorRT is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it by name
            self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
            self._errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity.name != "VERBOSE":
                self._lines.append(f"[{severity.name}] {msg}")
            if severity.name in ("ERROR", "INTERNAL_ERROR") and len(self._errors) < _KEPT_ERRORS:
                self._errors.append(" ".join(msg.split()))

        @property
        def lines(self) -> list[str]:
            return list(self._lines)

        def errors(self) -> str:
            found, self._errors = self._errors, []
            return " | ".join(found)[:600] or "no message"

    log: Logger = Log()
    return log


@contextlib.contextmanager
def refusals(doing: str, logger: Logger, error: type[DQEError] = BackendError) -> Iterator[None]:
    """Inside, what the bindings raise where TensorRT refuses leaves as `error`: RuntimeError where a function fails, ValueError for an
    invalid shape or a text that is not UTF-8, TypeError for a null pointer where an object was to be made."""
    try:
        yield
    except DQEError:
        raise
    except (RuntimeError, ValueError, TypeError) as problem:
        raise error(f"{doing}: {' '.join(str(problem).split())}: {logger.errors()}") from problem


def load_engine(trt: Any, plan: bytes, logger: Logger, *, host_code: bool) -> Any:
    """An ICudaEngine. `host_code`: the plan is version-compatible and brings its own runtime, which is then executed.

    Raises BackendError with TensorRT's own words. Call it only where a device is known to be there.
    """
    with refusals(f"TensorRT {trt.__version__} makes no runtime", logger):
        runtime = trt.Runtime(logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"TensorRT {trt.__version__} cannot load the engine: {logger.errors()}; build it again on this machine")
    return engine
