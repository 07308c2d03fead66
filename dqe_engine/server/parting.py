"""How a server stops listening without resetting anybody: first no new connection is made, then those that wait are taken, then it closes.

The kernel makes connections whether a process takes them or not. Closing the listening socket resets those that nobody took, although their
clients have sent requests by then.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
import time

_QUIET_S = 0.1
"""Seconds for which nobody may wait: a handshake that has begun ends in this time, or its client is far away."""
_LONGEST_S = 5.0
_SO_ATTACH_FILTER = 26
# A classic BPF program over the TCP header: drop what begins a connection (SYN without ACK), whose client tries again a second later.
_NO_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_UNACKED = 24  # offset in `struct tcp_info`; of a listening socket, the connections that nobody has taken


def stop_taking(listening: socket.socket) -> bool:
    """No new connection is made from now on, in any process that has this socket. False where the system has no such thing."""
    if sys.platform != "linux":
        return False
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in _NO_SYN))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(_NO_SYN), ctypes.addressof(code)))
    except OSError:  # a sandbox or an emulated kernel refuses
        return False
    return True


def waiting(listening: socket.socket) -> int:
    """Connections that are made and that no process has taken."""
    return int(struct.unpack_from("=I", listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), _UNACKED)[0])


class Quiet:
    """After `stop_taking`: whether all who came were taken, asked again and again."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._since = time.monotonic()
        self._latest = self._since + _LONGEST_S

    def __call__(self) -> bool:
        now = time.monotonic()
        if waiting(self._listening):
            self._since = now
        return now - self._since >= _QUIET_S or now >= self._latest
