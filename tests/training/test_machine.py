"""What others take of the processors' time while something is measured."""

from __future__ import annotations

import time

import pytest

from dqe_training import machine
from dqe_training.machine import Company, processor_seconds


def test_what_the_processors_did_is_read() -> None:
    before = processor_seconds()
    assert before is None or 0 < before[0] <= before[1]


def test_company_is_what_others_take_and_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 500.0), (108.0, 510.0), (200.0, 600.0), (201.0, 610.0)])  # 8 of 10 seconds, then 1 of 10
    own = iter([3.0, 5.0, 6.0, 7.0])  # of them, this process 2 and 1
    monkeypatch.setattr(machine, "processor_seconds", lambda: next(readings))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    company = Company()
    assert company.share is None
    with company:
        pass
    assert company.share == pytest.approx(0.6, rel=1e-12)
    with company:
        pass
    assert company.share == pytest.approx(0.3, rel=1e-12)


def test_company_is_unknown_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor_seconds", lambda: None)
    company = Company()
    with company:
        pass
    assert company.share is None
