"""Calls to Milvus: each ends within a number of seconds, in an answer or in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from dqe_engine.errors import BackendError, NoAnswerError

from .transports import MOST_LATE

_REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_ARGUMENT", "ALREADY_EXISTS", "UNIMPLEMENTED")
"""Statuses of gRPC."""
_FIRST_REFUSAL, _UNEXPECTED = 100, 65535
"""Milvus's own codes: below, it is not ready or the client did not reach it."""


class MilvusCalls:
    """Runs calls of Milvus's client in threads, so that the caller is free after `timeout` seconds whatever the client does.

    The client's own `timeout` is one of a try: some of its methods have none, and while it connects again, all threads of the process wait
    for one lock. Calls that are late run on until the client gives up; while `MOST_LATE` of them do, no other is begun.
    """

    def __init__(self, where: str, timeout: float, *, spare: bool = False) -> None:
        """where: the address, for messages. spare: after a call that was late, others fail at once, until a `look` is answered; for
        servers, which look all the time."""
        self.where, self.timeout, self._spare = where, timeout, spare
        self._lock = Lock()
        self._late: list[Future[Any]] = []
        self.spared = False
        """Whether a call was late, and none was answered since."""
        self._threads = ThreadPoolExecutor(64, "dqe-milvus")

    def __call__(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer of `question(*arguments, **options)`. Raises NoAnswerError where Milvus cannot be reached or is late, and
        BackendError, with its words, where it refuses."""
        if self.spared:
            raise self._no_answer(f"it was late (more than {self.timeout:g} s), and it is not waited for until it answers again")
        return self.ask(question, *arguments, **options)

    def look(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The same, also while Milvus is spared, which ends with an answer."""
        answer = self.ask(question, *arguments, **options)
        self.spared = False
        return answer

    def close(self) -> None:
        """Waits for nothing."""
        self._threads.shutdown(wait=False)

    def ask(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The same, also while Milvus is spared."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        with self._lock:
            self._late = [one for one in self._late if not one.done()]
            if len(self._late) >= MOST_LATE:
                raise self._too_late()
        asked = self._threads.submit(question, *arguments, **options)
        try:
            return asked.result(self.timeout)
        except TimeoutError as error:
            if not asked.done():
                self._keep(asked)
                raise self._too_late() from None
            raise self._no_answer(str(error)) from error  # the client's own
        except (MilvusException, RpcError) as error:
            reason, refused, late = _reason_of(error)
            if refused:
                raise BackendError(f"Milvus at {self.where} refused ({reason}); check the token, its rights and the request") from error
            raise (self._too_late() if late else self._no_answer(reason)) from error

    def _keep(self, asked: Future[Any]) -> None:
        if not asked.cancel():  # it has begun, so its thread goes on to the end
            with self._lock:
                self._late.append(asked)

    def _too_late(self) -> NoAnswerError:
        self.spared = self._spare
        return NoAnswerError(
            f"Milvus at {self.where} gave no answer within {self.timeout:g} s; check that it runs, or allow more time (timeout), then ask "
            "again"
        )

    def _no_answer(self, reason: str) -> NoAnswerError:
        return NoAnswerError(f"Milvus at {self.where} gave no answer ({reason}); check that it runs, then ask again")


def _reason_of(error: Any) -> tuple[str, bool, bool]:
    """What Milvus or its client says of an error, whether Milvus was there and refused, and whether it was late. The client says "Fail
    connecting" of a token that is refused, too: there, the cause says why."""
    from grpc import RpcError

    for one in (error, error.__cause__):
        if isinstance(one, RpcError) and (one is error or one.code().name in _REFUSALS):
            status = one.code().name
            return " ".join(f"{status}: {one.details()}".split())[:200], status in _REFUSALS, status == "DEADLINE_EXCEEDED"
    code = error.code if isinstance(error.code, int) else 0
    refused = getattr(error, "is_input_error", False) or _FIRST_REFUSAL <= code < _UNEXPECTED
    return " ".join(str(error.message).split())[:200], refused, False


def without_secrets(uri: str) -> str:
    """A URI without a user's name and password, for messages."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else uri
