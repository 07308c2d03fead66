"""Mutated requests and images for a running server: never a 5xx, and no memory that is not given back.

From tests/, `python -m support.server_fuzzing --requests 10000 --images 10000 --seed 1` starts a server with a tiny bundle. Request `n` is
made from the seed and `n` alone, so `--first 4711 --requests 1` sends that one again, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from dqe_engine.bundle import Bundle
from dqe_engine.server.writes import make_index

from . import hostile_images, mutations
from .chaos import Server, name, picture
from .server import WRITE_KEY, bearer
from .tiny_bundle import build_tiny_bundle

_SEARCH = {
    "reference_id": name(0), "text": "the same but red", "weights": {"colour": 2.0}, "unlike": [name(1)], "filter": {"n": {"<": 5}},
    "exclude": [name(2)], "exclude_reference": False, "k": 5, "offset": 1, "minimum_score": -1, "zones": True, "explain": True,
}  # fmt: skip
_ITEM = {"id": "new/1", "metadata": {"n": 1, "tags": ["a", "b"]}, "replace": True}
_PATHS = (
    "/v1/search",
    "/v1/items",
    "/v1/items?limit=5&filter=%7B%22n%22%3A1%7D",
    "/v1/facets?filter=%7B%22n%22%3A%7B%22%3C%22%3A3%7D%7D",
    "/v1/items/item%2F0000",
    "/v1/items/item%2F0000/image?size=160",
    "/v1/vocabulary",
    "/v1/status",
    "/v1/session",
    "/metrics",
    "/readyz",
    "/page/page.js",
    "/openapi.json",
)
_METHODS = ("GET", "POST", "PATCH", "DELETE", "HEAD", "PUT", "OPTIONS", "BREW")


def request(seed: int, n: int) -> bytes:
    """One mutated in its body, its parts, its headers, its path, or anywhere."""
    rng = random.Random(f"{seed}.{n}")
    kind = rng.choice(("json", "json", "parts", "item", "head", "bytes"))
    method, path, body = "POST", "/v1/search", json.dumps(_SEARCH).encode()
    headers = {"Host": "127.0.0.1", "Authorization": f"Bearer {WRITE_KEY}", "Content-Type": "application/json", "X-Deadline-Ms": "5000"}
    if kind == "json":
        body = mutations.mutated(body, rng)
        if rng.random() < 0.2:
            method, path, body = "PATCH", "/v1/items/item%2F0000", mutations.mutated(b'{"metadata": {"n": 1, "a": [true, "x"]}}', rng)
    elif kind in ("parts", "item"):
        path, field, document = ("/v1/search", "query", {"text": "red"}) if kind == "parts" else ("/v1/items", "item", _ITEM)
        asked = json.dumps(document).encode()
        body = _parts(field, mutations.mutated(asked, rng) if rng.random() < 0.5 else asked, picture(rng.randrange(4)))
        if rng.random() < 0.7:
            body = _damaged(body, rng)
        headers["Content-Type"] = rng.choice(
            ("multipart/form-data; boundary=b", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 100)
        )
    elif kind == "head":
        method, path = rng.choice(_METHODS), rng.choice(_PATHS)
        headers[rng.choice([*headers, "Content-Length", "Transfer-Encoding", "X-Request-ID", "If-None-Match", "Cookie", "Expect"])] = (
            rng.choice(
                ("", "0", "-1", "9" * 30, "chunked", "100-continue", "a" * 2000, "dqe_key=" + WRITE_KEY, "\x01", "é", "*", 'W/"x", "y"')
            )
        )
    lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
    if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    whole = "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body
    if kind == "head" and rng.random() < 0.5:
        end = whole.index(b" HTTP/")
        whole = _damaged(whole[:end], rng) + whole[end:]
    return _damaged(whole, rng) if kind == "bytes" else whole


def image_request(seed: int, n: int) -> bytes:
    """A search, or a write, with a mutated image, as httpx sends it."""
    ordinary = _ordinary()
    image = hostile_images.mutated(ordinary[n % len(ordinary)], np.random.default_rng((seed, n)))
    path, field, asked = (
        ("/v1/search", "query", {"text": "red", "k": 3}) if n % 2 else ("/v1/items", "item", _ITEM | {"id": f"new/{n % 50}"})
    )
    files = {field: (None, json.dumps(asked), "application/json"), "image": ("photo.jpg", image, "image/jpeg")}
    headers = bearer(WRITE_KEY) | {"Content-Type": f"multipart/form-data; boundary=fuzz-{seed}-{n}"}
    made = httpx.Request("POST", f"http://127.0.0.1{path}", headers=headers, files=files)
    body = made.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in made.headers.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def status(port: int, whole: bytes) -> int:
    """Of the answer; 0 where the connection ended without one, or where the server waits for the rest of what it takes for a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
        try:
            connection.sendall(whole)
            answer = b""
            while b"\r\n" not in answer and (data := connection.recv(65536)):
                answer += data
        except (ConnectionError, TimeoutError):
            return 0
    found = re.match(rb"HTTP/1.1 (\d{3})", answer)
    return int(found[1]) if found else 0


def _parts(field: str, document: bytes, image: bytes) -> bytes:
    disposition = b'--b\r\nContent-Disposition: form-data; name="%s"'
    first = disposition % field.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + document + b"\r\n"
    return first + disposition % b"image" + b'; filename="i"\r\nContent-Type: image/png\r\n\r\n' + image + b"\r\n--b--\r\n"


def _damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) or 1)
        action = rng.randrange(4)
        if action == 0 and changed:
            changed[at] = rng.randrange(256)
        elif action == 1:
            del changed[at : at + rng.choice((1, 3, 50))]
        elif action == 2:
            changed[at:at] = rng.choice(
                (b"\0", b"\r\n", b"\r\n\r\n", b"--b", b"--b--", b":", b"%", b"%00", b"%ff", b"../", b"a" * 3000, b"\xff")
            )
        else:
            changed[at:at] = changed[at : at + 40]
    return bytes(changed)


_IMAGES: list[bytes] = []


def _ordinary() -> list[bytes]:
    if not _IMAGES:
        _IMAGES.extend(hostile_images.ordinary_images())
    return _IMAGES


def fuzz(server: Server, seed: int, requests: int, images: int, first: int = 0, told: bool = False) -> Counter[int]:
    """Statuses. Raises AssertionError for a 5xx, but for those that say that a deadline passed."""
    found: Counter[int] = Counter()
    for kind, make, count in (("request", request, requests), ("image", image_request, images)):
        for n in range(first, first + count):
            answer = status(server.port, make(seed, n))
            found[answer] += 1
            assert answer < 500 or answer == 504, f"{kind} {n} of seed {seed}: {answer}"
            if told and n % 1000 == 999:
                print(f"{kind} {n + 1}: {server.resident_kib()} KiB resident, {dict(sorted(found.items()))}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m support.server_fuzzing", description=__doc__)
    for option, default in (("--requests", 10_000), ("--images", 10_000), ("--seed", 1), ("--first", 0)):
        parser.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_tiny_bundle(Path(folder) / "bundle")
        make_index(Bundle.load(bundle), Path(folder) / "index")
        with Server(bundle, Path(folder), workers=1) as server:
            for n in range(4):
                assert server.put(n).status_code == 201
            print(dict(sorted(fuzz(server, args.seed, args.requests, args.images, args.first, told=True).items())))
            bad = [line for line in server.log().splitlines() if '"level":"error"' in line]
            print(f"{len(bad)} errors in the log", *bad[:3], sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
