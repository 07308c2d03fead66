"""Token buckets."""

from __future__ import annotations

import pytest

from dqe_engine.errors import InputError
from dqe_engine.server.peers import is_loopback, network_of
from dqe_engine.server.rates import Rates


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_then_the_rate() -> None:
    clock = Clock()
    rates = Rates(2.0, 3.0, clock=clock)
    assert [rates.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rates.take("b") == 0
    clock.now += 0.25
    assert rates.take("a") == pytest.approx(0.25)  # what was refused did not count
    clock.now += 0.25
    assert rates.take("a") == 0
    assert rates.take("a") == pytest.approx(0.5)
    clock.now += 1e9
    assert [rates.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_clock_that_goes_back_gives_nothing_and_takes_nothing() -> None:
    clock = Clock()
    rates = Rates(1.0, 1.0, clock=clock)
    assert rates.take("a") == 0
    clock.now -= 50
    assert rates.take("a") == 1
    clock.now += 1
    assert rates.take("a") == 0


def test_the_clients_that_are_remembered_are_bounded_and_the_oldest_goes() -> None:
    rates = Rates(1e-9, 1.0, clients=100, clock=Clock())
    for number in range(1000):
        assert rates.take(str(number)) == 0
    assert len(rates) == 100
    assert rates.take("999") > 0
    assert rates.take("0") == 0


@pytest.mark.parametrize(
    ("rate", "burst", "clients"), [(0, 1, 1), (-1, 1, 1), (float("nan"), 1, 1), (1, 0.5, 1), (1, float("nan"), 1), (1, 1, 0)]
)
def test_bounds_are_checked(rate: float, burst: float, clients: int) -> None:
    with pytest.raises(InputError):
        Rates(rate, burst, clients=clients)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_what_counts_as_one_client(address: str, network: str) -> None:
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("::2", False), ("10.0.0.1", False), ("", False)],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
