"""When the 8-bit copy of items on a CUDA device is used: where a search then reads fewer bytes."""

from __future__ import annotations

MAX_WIDTH = 65536
"""Of tokens that can be coded; wider rows could overflow the 32-bit sums of products."""
CODE_ALIGNMENT = 16
NUMBERS_BYTES = 12
"""Beside the codes of each token: scale, error, norm."""
QUERIES_A_PASS = 64
"""Queries that read the codes together; and the items, with the kernels for sm_80."""
OVERHEAD_BYTES = 64 << 20
"""What the screen's own small kernels cost, as bytes that the memory moves meanwhile (some 25 µs; estimated, not measured)."""
FIRST_GUESS = 16.0
"""Tokens that are scored in full for each of the k wanted, before a search has told."""


class DeviceScreen:
    """The rule, and what searches have taught it.

    Without the screen, each 64 queries read all items (128 or 256 with the kernels for sm_90a: `a_pass`). With it each 64 read codes and 12
    bytes for each token, and each query the tokens that its bounds leave. A search whose lists overflow is carried out without, on top of
    what was spent: then 1, 3, 7, ... searches do not try, unless the screen is always used.
    """

    def __init__(self, size: int, tokens: int, width: int, item_bytes: int, *, always: bool) -> None:
        self.rows, self.tokens, self.width, self.item_bytes, self.always = size * tokens, tokens, width, item_bytes, always
        self.suits = size > 0 and width <= MAX_WIDTH and tokens in (1, 2, 4, 8, 16, 32)
        self._survivors = FIRST_GUESS
        self._pause = self._paused = 0

    def reads(self, batch: int, k: int, a_pass: int = QUERIES_A_PASS) -> tuple[float, float]:
        """Bytes with the screen, and without, where `a_pass` queries read the items together."""
        passes, row = -(-batch // QUERIES_A_PASS), self.width * self.item_bytes
        coded = -(-self.width // CODE_ALIGNMENT) * CODE_ALIGNMENT + NUMBERS_BYTES
        return passes * self.rows * coded + batch * k * self._survivors * row + OVERHEAD_BYTES, float(-(-batch // a_pass) * self.rows * row)

    def would_pay(self, batch: int, k: int, a_pass: int = QUERIES_A_PASS) -> bool:
        """Whether the next search uses the screen."""
        if not self.suits or k == 0 or batch == 0 or self._paused > 0:
            return False
        screened, plain = self.reads(batch, k, a_pass)
        return self.always or screened < plain

    def pays(self, batch: int, k: int, a_pass: int = QUERIES_A_PASS) -> bool:
        """As `would_pay`, for a search that is now carried out: one of those that do not try after an overflow."""
        pays = self.would_pay(batch, k, a_pass)
        if self.suits and k and batch and self._paused > 0:
            self._paused -= 1
        return pays

    def learn(self, batch: int, k: int, rescored: int) -> int | None:
        """Take in what a screened search says; returns it as a result has it. rescored: -1 where lists overflowed."""
        if rescored < 0:
            if not self.always:
                self._pause = self._paused = min(2 * self._pause + 1, 255)
            return None
        self._pause, self._survivors = 0, rescored / (batch * k)
        return rescored

    def describe(self, batch: int, k: int, a_pass: int = QUERIES_A_PASS) -> str:
        if not self.suits:
            return f"no screen: {self.rows:,} tokens, {self.tokens} an item of {self.width} numbers (1, 2, 4, ... 32 can be screened)"
        screened, plain = self.reads(batch, k, a_pass)
        chosen = "always the screen" if self.always else "the screen" if screened < plain else "the items"
        pause = f"; {self._paused} searches after one that overflowed read the items" if self._paused else ""
        return (
            f"8-bit codes of {self.rows:,} tokens; {batch} queries for {k}: {screened / 2**20:,.0f} MiB with the screen "
            f"({self._survivors:.1f} tokens in full for each wanted), {plain / 2**20:,.0f} without: {chosen}{pause}"
        )
