"""Several workers of `dqe-serve` over one Ray cluster: the actors of a name are started once, and outlive whoever uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import Server, serving

from dqe_engine.client import Client
from dqe_engine.index import GalleryIndex
from dqe_engine.index.on_ray_shards import NAMESPACE, open_on_ray, stop
from dqe_engine.index.searched import Health
from dqe_engine.index.shard_files import cut_index

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def shards(shop: Path, tmp_path: Path) -> Path:
    with GalleryIndex.load(shop / "index") as index:
        cut_index(index, tmp_path / "shards", 2)
    return tmp_path / "shards"


@pytest.fixture
def address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def place(shards: Path) -> Iterator[Path]:
    """A file that names the shards' actors `shared`, which end with the test."""
    file = shards.with_name("shop.json")
    shards_at = {"path": "shards", "on_loss": "partial", "name": "shared"}
    file.write_text(json.dumps({"kind": "index-elsewhere", "schema_version": 1, "shards": shards_at}))
    yield file
    stop("shared")


def actors() -> dict[str, int]:
    """Process ids of the actors that live, by name."""
    import ray

    found = {}
    for one in ray.util.list_named_actors(all_namespaces=True):
        if one["namespace"] == NAMESPACE:
            handle = ray.get_actor(one["name"], namespace=NAMESPACE)
            found[one["name"]] = ray.get(handle.__ray_call__.remote(lambda self: os.getpid()))
    return found


def until(holds: Callable[[], Any], server: Server) -> None:
    end = time.monotonic() + 180  # Ray takes a minute where others keep the processors busy
    while not holds():
        assert time.monotonic() < end, server.said
        time.sleep(0.05)


def test_workers_share_actors_that_outlive_them(bundle_path: Path, shop: Path, place: Path, address: str, tmp_path: Path) -> None:
    options = ["--images", str(shop / "photos"), "--provider", "cpu", "--threads", "1", "--workers", "2", "--deadline", "120"]
    with serving([str(bundle_path), str(place), *options], tmp_path, environment={"RAY_ADDRESS": address}, wait=180) as server:
        until(lambda: len(server.workers()) == 2, server)
        with Client(server.url) as client:
            assert len(client.search(text="in red", k=24).hits) == 24
            started, first, last = actors(), *sorted(server.workers())
            assert len(started) == 2, "one for each shard, whatever the number of workers"
            os.kill(first, signal.SIGKILL)
            until(lambda: first not in server.workers(), server)
            assert client.search(text="in red", k=24).lost == ()
            assert actors() == started, "the other worker's actors go on"
        server.end(signal.SIGKILL)  # perhaps while a worker starts in the place of the first
        until(lambda: not Path(f"/proc/{last}").exists(), server)
    assert actors() == started, "kept for whoever comes next"
    with open_on_ray(place.with_name("shards"), name="shared", on_loss="partial", timeout=120) as index:
        assert index.look() == Health(2)
        assert actors() == started
    assert stop("shared") == 2
    assert not actors()


def test_actors_without_a_name_end_with_a_process_that_is_killed(shards: Path, address: str) -> None:
    """Ray ends them; nothing is left that holds memory and processors."""
    import ray

    program = """if True:
        import os, signal, sys
        from dqe_engine.index.on_ray_shards import open_on_ray
        index = open_on_ray(sys.argv[1], timeout=120)
        handle = index._transport.actor(0)
        import ray
        print(ray.get(handle.__ray_call__.remote(lambda self: os.getpid())), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "RAY_ADDRESS": address}
    ended = subprocess.run([sys.executable, "-c", program, str(shards)], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    actor, end = Path(f"/proc/{int(ended.stdout)}"), time.monotonic() + 180
    while actor.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert ray.is_initialized(), "the cluster goes on"
