"""When the 8-bit copy of items on a CUDA device is used: where a search is then expected to take less time.

Times are told in the bytes that an H100's memory moves meanwhile (3 TB/s). They are estimates: no device has run the screen yet."""

from __future__ import annotations

MAX_WIDTH = 65536
"""Of tokens that can be coded; wider rows could overflow the 32-bit sums of products."""
CODE_ALIGNMENT = 16
NUMBERS_BYTES = 12
"""Beside the codes of each token: scale, error, norm."""
QUERIES_A_PASS = 64
"""Queries that read the codes together; and the items, with the kernels for sm_80."""
OVERHEAD_BYTES = 64 << 20
"""What the screen's own small kernels cost (some 25 µs)."""
PAIR_BYTES = 97
"""What each item costs a pass of 64 queries whose bounds are compared and written down (32 µs for a million); fewer queries cost less. With
the kernels for sm_90a it is nothing, since their instructions take less time than memory does."""
SM_80_BYTES = 64 << 20
"""What the kernels for sm_80 take longer than those for sm_90a to sample, score and finish lists for 64 queries or more (some 20 µs). A
screened search takes them on a Hopper too."""
FIRST_GUESS = 16.0
"""Tokens that are scored in full for each of the k wanted, before a search has told."""


Unscreened = tuple[str, int]
"""Which kernels a search takes that uses no screen, "sm_80" or "sm_90a", and how many of its queries read the items together."""
SM_80: Unscreened = ("sm_80", QUERIES_A_PASS)


class DeviceScreen:
    """The rule, and what searches have taught it.

    Without the screen, each 64 queries read all items (128 or 256 with the kernels for sm_90a). With it each 64 read codes and 12 bytes for
    each token, and each query the tokens that its bounds leave. A search whose lists overflow is carried out without, on top of what was
    spent: then 1, 3, 7, ... searches do not try, unless the screen is always used.
    """

    def __init__(self, size: int, tokens: int, width: int, item_bytes: int, *, always: bool) -> None:
        self.rows, self.tokens, self.width, self.item_bytes, self.always = size * tokens, tokens, width, item_bytes, always
        self.suits = size > 0 and width <= MAX_WIDTH and tokens in (1, 2, 4, 8, 16, 32)
        self._survivors = FIRST_GUESS
        self._pause = self._paused = 0

    def costs(self, batch: int, k: int, unscreened: Unscreened = SM_80) -> tuple[float, float]:
        """With the screen, and without: bytes that are read, and time as bytes."""
        architecture, a_pass = unscreened
        passes, row = -(-batch // QUERIES_A_PASS), self.width * self.item_bytes
        coded = -(-self.width // CODE_ALIGNMENT) * CODE_ALIGNMENT + NUMBERS_BYTES
        share, items = batch / QUERIES_A_PASS, self.rows / self.tokens
        computing = min(share, 1) * SM_80_BYTES if architecture == "sm_90a" else share * items * PAIR_BYTES
        screened = passes * self.rows * coded + computing + batch * k * self._survivors * row + OVERHEAD_BYTES
        return screened, float(-(-batch // a_pass) * self.rows * row)

    def would_pay(self, batch: int, k: int, unscreened: Unscreened = SM_80) -> bool:
        """Whether the next search uses the screen."""
        if not self.suits or k == 0 or batch == 0 or self._paused > 0:
            return False
        screened, plain = self.costs(batch, k, unscreened)
        return self.always or screened < plain

    def pays(self, batch: int, k: int, unscreened: Unscreened = SM_80) -> bool:
        """As `would_pay`, for a search that is now carried out: one of those that do not try after an overflow."""
        pays = self.would_pay(batch, k, unscreened)
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

    def describe(self, batch: int, k: int, unscreened: Unscreened = SM_80) -> str:
        if not self.suits:
            taken = f"a screen takes 1, 2, 4, 8, 16 or 32 tokens an item, of at most {MAX_WIDTH:,} numbers"
            return f"no screen: {self.rows:,} tokens, {self.tokens} an item, of {self.width:,} numbers; {taken}"
        screened, plain = self.costs(batch, k, unscreened)
        chosen = "always the screen" if self.always else "the screen" if screened < plain else "the items"
        pause = f"; {self._paused} more searches read the items, since the candidates of one overflowed their lists" if self._paused else ""
        return (
            f"8-bit codes of {self.rows:,} tokens; {batch} queries for {k} cost {screened / 2**20:,.0f} MiB with the screen "
            f"({self._survivors:.1f} tokens in full for each wanted), {plain / 2**20:,.0f} without: {chosen}{pause}"
        )
