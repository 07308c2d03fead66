"""Processes that make one index and write to it at the same time: what was confirmed is there, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.writing import png, there

from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import IndexConflictError, IndexFormatError
from dqe_engine.index import GalleryIndex
from dqe_engine.server.photos import Photos
from dqe_engine.server.writes import Writes, make_index


def test_an_index_is_made_where_there_is_none(engine: RetrievalEngine, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "index"
    made: list[bool] = []
    threads = [threading.Thread(target=lambda: made.append(make_index(engine.bundle, path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    engine.load_index(path)
    assert len(engine.index) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(IndexConflictError, match="holds other things"):
        make_index(engine.bundle, tmp_path / "other")
    with pytest.raises(IndexFormatError, match="cannot be written"):
        make_index(engine.bundle, tmp_path / "other" / "file" / "index")


def start_worker(bundle: Path, index: Path, name: str, count: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "tests"), str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "support.write_workers", str(bundle), str(index), name, str(count)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_processes_write_to_one_index(bundle_path: Path, index_path: Path, engine: RetrievalEngine, killed: bool) -> None:
    """Each has a `Writes` of its own; whatever becomes of one, what was confirmed is there, once, and the others go on."""
    count, names = int(os.environ.get("DQE_WRITES", "200")), ("a", "b", "c", "d")
    workers = {name: start_worker(bundle_path, index_path, name, count) for name in names}
    confirmed: dict[str, list[str]] = {name: [] for name in names}
    try:
        for worker in workers.values():
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()

        def read(name: str, worker: subprocess.Popen[str]) -> None:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.endswith("\n"):
                    confirmed[name].append(line.strip())
                if killed and name == "b" and len(confirmed[name]) == count // 4:
                    worker.send_signal(signal.SIGKILL)

        readers = [threading.Thread(target=read, args=pair) for pair in workers.items()]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(300)
        codes = {name: worker.wait(60) for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    assert codes == {name: -signal.SIGKILL if killed and name == "b" else 0 for name in names}
    found = there(index_path)
    with GalleryIndex.load(index_path) as index:
        assert len(index.ids) == len(set(index.ids))
    for name in names:
        assert len(set(confirmed[name])) == len(confirmed[name])
        assert set(confirmed[name]) <= set(found)
        if not (killed and name == "b"):
            assert len(confirmed[name]) == count
    assert all(found[id][0] == {"by": id[0], "n": int(id[2:])} for id in found)
    photos = Photos([], Path(f"{index_path}.uploads"))
    assert all(photos.has_upload(content) for _, content in found.values())
    writes = Writes(index_path, engine, photos)
    writes.add("after", png(999)).result(60)
    assert len(there(index_path)) == len(found) + 1
    writes.close()
