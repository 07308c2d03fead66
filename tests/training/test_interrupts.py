"""Signals that are held back until a step is done, and those that were ignored from the start."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dqe_training.run.interrupts import held_signals

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _dispositions() -> Iterator[None]:
    before = [signal.signal(number, signal.default_int_handler) for number in NUMBERS]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_held_and_told(number: signal.Signals) -> None:
    with held_signals(several=False) as asked:
        assert not asked()
        signal.raise_signal(number)
        assert asked()
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
def test_an_ignored_signal_stays_ignored(number: signal.Signals, several: bool) -> None:
    other = next(n for n in NUMBERS if n is not number)
    signal.signal(number, signal.SIG_IGN)  # as nohup, or a shell's background job, leaves it
    with held_signals(several=several) as asked:
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.raise_signal(number)
        assert not asked()
        signal.raise_signal(other)
        assert asked()
    assert signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(other) is signal.default_int_handler
