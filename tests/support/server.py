"""Keys of the servers that tests start."""

from __future__ import annotations

READ_KEY, WRITE_KEY = "read-key-0123456789", "write-key-0123456789"


def bearer(key: str) -> dict[str, str]:
    """Headers of a request with this key."""
    return {"Authorization": f"Bearer {key}"}
