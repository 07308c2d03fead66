"""What a save confirmed outlives power cuts, full disks and failing calls; what it did not confirm is not half there."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import directory_workload
from support.disk_workload import add, contents, new_index
from support.power_loss import build_recorder, crashes, lay_out
from support.samples import target_rows

from dqe_engine.errors import IndexFormatError
from dqe_engine.files import recover_directory, remove_stale_temporaries
from dqe_engine.index import GalleryIndex

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None or not sys.platform.startswith("linux"), reason="no gcc, or no LD_PRELOAD")


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_recorder(tmp_path_factory.mktemp("recorder"))


def run_recorded(recorder: Path, root: Path, *arguments: object, workload: str = "disk_workload") -> tuple[list[Any], str]:
    """Lines that the workload printed, and the log of its calls below `root`."""
    roots = [Path(__file__).parents[1], Path(__file__).parents[2]]
    log = root.parent / f"{root.name}.log"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")]),
        "LD_PRELOAD": str(recorder), "DISK_CALLS_ROOT": str(root), "DISK_CALLS_LOG": str(log),
    }  # fmt: skip
    command = [sys.executable, "-m", f"support.{workload}", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()], log.read_text()


def test_power_may_fail_at_any_moment_of_a_save(recorder: Path, tmp_path: Path) -> None:
    """The last confirmed save, or the one after it that was begun, is there whole, and can be gone on with."""
    saves, seed = int(os.environ.get("DQE_POWER_SAVES", "9")), int(os.environ.get("DQE_POWER_SEED", "0"))
    root = tmp_path / "disk"
    root.mkdir()
    expected, log = run_recorded(recorder, root, "record", root / "deep" / "index", saves, seed)
    found, count, goes_on = [], 0, 0
    for count, (marks, state) in enumerate(crashes(log, random.Random(seed), root), start=1):
        folder = tmp_path / "state"
        folder.mkdir()
        lay_out(state, root, folder)
        path = folder / "deep" / "index"
        confirmed = max((int(mark.split()[1]) for mark in marks if mark.startswith("confirmed")), default=0)
        begun = sum(mark.startswith("begin") for mark in marks)
        try:
            index = new_index()
            if confirmed or (path / "manifest.json").exists():
                index = GalleryIndex.load(path, verify=True)
                assert contents(index) in expected[max(confirmed, 1) - 1 : begun], f"save {confirmed} is gone, or something else is there"
            if count % 7 == 0 or not confirmed:
                goes_on += 1
                before = contents(index)
                add(index, ["after"], [7])
                index.save(path)
                assert contents(GalleryIndex.load(path, verify=True)) == before | {"after": [7, {"seed": 7}]}
        except (IndexFormatError, AssertionError) as error:
            files = sorted(str(Path(file).relative_to(root)) for file in state)
            found.append(f"{marks[-1:]} {files}: {str(error).splitlines()[0].replace(str(folder), '')}")
        shutil.rmtree(folder)
    assert not found, f"{len(found)} of {count} states:\n" + "\n".join(dict.fromkeys(found))[:8000]
    assert count > 15 * saves
    assert goes_on > 2 * saves
    print(f"{saves} saves, {count} states, {goes_on} gone on with")


def tree(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_power_may_fail_at_any_moment_of_a_directory(recorder: Path, tmp_path: Path) -> None:
    """A new one is whole or absent; one that is replaced is the old one or the new one, and whoever reads or writes next finds it."""
    times, seed = int(os.environ.get("DQE_POWER_SAVES", "9")), int(os.environ.get("DQE_POWER_SEED", "0"))
    root = tmp_path / "disk"
    root.mkdir()
    _, log = run_recorded(recorder, root, root / "deep" / "run", times, workload="directory_workload")
    found, count = list[str](), 0
    for count, (marks, state) in enumerate(crashes(log, random.Random(seed), root), start=1):
        folder = tmp_path / "state"
        folder.mkdir()
        lay_out(state, root, folder)
        path = folder / "deep" / "run"
        confirmed = max((int(mark.split()[1]) for mark in marks if mark.startswith("confirmed")), default=0)
        begun = sum(mark.startswith("begin") for mark in marks)
        try:
            for old in path.parent.glob(".tmp-*/old"):
                assert tree(old) in [directory_workload.contents(number) for number in range(1, times)], "half of it would be restored"
            if count % 2:
                recover_directory(path)
            elif path.parent.exists():
                remove_stale_temporaries(path)
                assert not [name for name in os.listdir(path.parent) if name != "run"], "temporaries are left"
            allowed = [directory_workload.contents(number) for number in range(max(confirmed, 1), begun + 1)]
            assert (confirmed == 0 and not path.exists()) or tree(path) in allowed, f"{confirmed} is gone, or something else is there"
            if count % 7 == 0:
                directory_workload.write(path, 99, replace=True)
                assert tree(path) == directory_workload.contents(99)
                assert os.listdir(path.parent) == ["run"]
        except (OSError, AssertionError) as error:
            files = sorted(str(Path(file).relative_to(root)) for file in state)
            found.append(f"{marks[-1:]} {files}: {str(error).splitlines()[0].replace(str(folder), '')}")
        shutil.rmtree(folder)
    assert not found, f"{len(found)} of {count} states:\n" + "\n".join(dict.fromkeys(found))[:8000]
    assert count > 70 * times
    print(f"{times} times, {count} states")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("all_after", [False, True])
def test_any_call_of_a_save_may_fail(recorder: Path, tmp_path: Path, error: int, all_after: bool) -> None:
    """The index in memory and readers go on, the last save is there, and the next one, once the disk is well again, succeeds."""
    root = tmp_path / "disk"
    root.mkdir()
    (tried,), _ = run_recorded(recorder, root, "fail", root, error, int(all_after))
    assert tried > 60


def test_kills_at_any_moment(recorder: Path, tmp_path: Path) -> None:
    """What was confirmed is there, nothing else is half there, and whoever follows sees one save after the other."""
    kills = int(os.environ.get("DQE_KILLS", "12"))
    ((saves, cut, followed),), _ = run_recorded(recorder, tmp_path / "disk", "kill", tmp_path / "index", kills, 0)
    print(f"{kills} kills, {saves} saves confirmed, {cut} cut short, {followed} followed")
    assert saves > kills
    assert cut > kills // 4
    assert followed > kills // 2


def test_a_disk_that_is_full(tmp_path: Path, make_index: Callable[..., GalleryIndex]) -> None:
    """As the kernel has it: a limit of file sizes."""
    index, path = make_index(5), tmp_path / "index"
    index.save(path)
    index.add([f"n{n}" for n in range(200)], target_rows(200, 7))
    before, limits = set(index.ids), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        for compact in (False, True):
            with pytest.raises(IndexFormatError, match=r"cannot be written \(File too large\); raise the limit"):
                index.compact() if compact else index.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(GalleryIndex.load(path, verify=True)) == 5
    index.save(path)
    assert set(GalleryIndex.load(path, verify=True).ids) == set(index.ids) == before
