"""An engine that was loaded before a fork: its children say so at once, and end at once. And what cannot be pickled says so."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dqe_engine.batching import Batcher
from dqe_engine.contracts.graphs import VISION_ENCODER
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.forks import ProcessBound

PARENT = """
    import os, sys, weakref
    from pathlib import Path
    import numpy as np
    from dqe_engine.batching import Batcher
    from dqe_engine.engine import RetrievalEngine
    from dqe_engine.errors import DQEError
    from dqe_engine.forks import ProcessBound
    from dqe_engine.query import Query

    class OnDevice(ProcessBound):
        def __init__(self):
            self.bind_to_process(weakref.finalize(self, print, "released in", os.getpid()))

        def __del__(self):
            print("destroyed in", os.getpid())

    bundle, image = sys.argv[1:]
    engine, batcher = RetrievalEngine.load(bundle, threads=3), Batcher(lambda asked: asked)
    engine.encode_images([Path(image)] * 4)
    batcher.submit(1).result()  # its worker's thread
    on_device = OnDevice()
    queries, items = np.ones((1, 64), np.float32), np.ones((200_000, 64), np.float32)
    from dqe_engine.zones import select_zones
    select_zones(queries, items, k=3, threads=3)
    print("parent", os.getpid(), flush=True)

    def child():
        for use in (lambda: engine.search(Query(text="red", image=Path(image))), lambda: batcher.submit(2)):
            try:
                use()
            except DQEError as error:
                print(f"{type(error).__name__}: {error}")
        assert select_zones(queries, items, k=3, threads=3).ids.tolist() == [[0, 1, 2]]
        own = RetrievalEngine.load(bundle, threads=2)
        print("own", own.encode_images([Path(image)]).target_tokens.shape)
        sys.exit(3)

    pid = os.fork()
    if pid == 0:
        child()
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    del on_device
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_a_child_of_a_process_with_an_engine(bundle_path: Path, image: Path) -> None:
    """Its use is an error, its end is not held up, its own engine works; nothing of the parent's is released in it."""
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(bundle_path), str(image)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)  # without the guard, it hangs or crashes
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stderr
    assert "ended 3" in lines, ran.stdout + ran.stderr
    remedy = "was made before a fork, and works in the parent alone; load the engine in each worker (gunicorn: in post_fork"
    assert [line.split(" in each")[0] for line in lines if line.startswith("BackendError")] == [
        f"BackendError: this {name} {remedy}".split(" in each")[0] for name in ("RetrievalEngine", "Batcher")
    ]
    assert "own (1, 3, 8)" in lines
    parent = next(line.split()[1] for line in lines if line.startswith("parent"))
    assert [line for line in lines if line.startswith(("released", "destroyed"))] == [f"destroyed in {parent}", f"released in {parent}"]


def test_what_cannot_be_pickled_says_so(bundle_path: Path) -> None:
    engine = RetrievalEngine.load(bundle_path, provider="cpu")
    session, batcher = engine.bundle.session(VISION_ENCODER, provider="cpu"), Batcher(lambda asked: asked)
    engine.new_index()
    for held, remedy in (
        (engine, "load it in the other process, from the bundle's path"),
        (session, "load it in the other process, from the bundle's path"),
        (batcher, "load it in the other process, from the bundle's path"),
        (engine.index, "save it, and load it in the other process by its path"),
    ):
        for send in (pickle.dumps, copy.deepcopy):
            with pytest.raises(InputError, match=f"cannot be pickled or copied; {remedy}") as caught:
                send(held)
            assert "\n" not in str(caught.value)
    assert isinstance(session, ProcessBound)
