"""Requests made from a seed, as a file for `paced` and as a script for wrk. References and texts are paired at random, so that no cache has
the answer."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_HEAD = "POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {type}\r\nContent-Length: {length}\r\n\r\n"
_BOUNDARY = "a4c6f1d2e8"
_SCRIPT = """\
local requests, counts = {}, {}
local file = io.open("%s", "rb")
while true do
  local length = file:read(4)
  if not length then break end
  local a, b, c, d = length:byte(1, 4)
  requests[#requests + 1] = file:read(a + 256 * (b + 256 * (c + 256 * d)))
end
file:close()
local at = 0
function request()
  at = at %% #requests + 1
  return requests[at]
end
function response(status)
  counts[status] = (counts[status] or 0) + 1
end
local threads = {}
function setup(thread) threads[#threads + 1] = thread end
function told()
  local parts = {}
  for status, count in pairs(counts) do parts[#parts + 1] = '"' .. status .. '": ' .. count end
  return table.concat(parts, ", ")
end
function done(summary, latency)
  io.write(string.format('JSON {"requests": %%d, "seconds": %%f, "p50_ms": %%f, "p90_ms": %%f, "p99_ms": %%f, "max_ms": %%f, ' ..
    '"timeouts": %%d, "failed_connections": %%d}\\n', summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(90) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3, summary.errors.timeout,
    summary.errors.connect + summary.errors.read + summary.errors.write))
  io.write('ERRORS ' .. summary.errors.status .. '\\n')
end
"""


def searches(demo: Path, count: int, seed: int) -> Iterator[bytes]:
    """Searches by an item and a text, each pair drawn at random from the data set's queries."""
    ids, texts = _drawn_from(demo)
    rng = random.Random(seed)
    for _ in range(count):
        yield _request(json.dumps({"reference_id": rng.choice(ids), "text": rng.choice(texts)}).encode(), "application/json")


def uploads(demo: Path, count: int, seed: int) -> Iterator[bytes]:
    """Searches by an uploaded photo and a text. The photo's bytes are new each time: a comment at its end is the request's number."""
    ids, texts = _drawn_from(demo)
    rng = random.Random(seed)
    for n in range(count):
        photo = (demo / "garments" / "images" / rng.choice(ids)).read_bytes() + f"{seed}.{n}".encode()
        query = json.dumps({"text": rng.choice(texts)})
        body = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="query"\r\nContent-Type: application/json\r\n\r\n{query}\r\n'
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        yield _request(body + photo + f"\r\n--{_BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={_BOUNDARY}")


def write(requests: Iterable[bytes], folder: Path, name: str) -> tuple[Path, Path]:
    """The file of these requests, and wrk's script that sends them."""
    file, script = folder / f"{name}.requests", folder / f"{name}.lua"
    with file.open("wb") as stream:
        for request in requests:
            stream.write(struct.pack("<I", len(request)) + request)
    script.write_text(_SCRIPT % file)
    return file, script


def _drawn_from(demo: Path) -> tuple[list[str], list[str]]:
    records = [json.loads(line) for line in (demo / "garments" / "val.jsonl").read_text().splitlines()]
    return sorted({record["reference"] for record in records}), sorted({record["text"] for record in records})


def _request(body: bytes, type: str) -> bytes:
    return _HEAD.format(type=type, length=len(body)).encode() + body
