"""A folder of mined negatives: it survives kills at any moment, and tells what does not fit."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support import mining_workers
from support.fork_server import ForkServer
from support.full_disk import files_of_at_most
from support.mining_workers import BLOCK, PICKS, QUERIES, ZONES, assert_same, job, mine, problem

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.files import recover_directory
from dqe_engine.zones import mining, mining_plan
from dqe_engine.zones.mined_folder import MANIFEST_FILE, read_mined
from dqe_engine.zones.mining import ARRAYS, MiningJob
from dqe_engine.zones.mining_folder import MiningOutcome, mine_to_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def interrupted(out: Path, blocks: int, **options: Any) -> None:
    """Ctrl-C after some blocks."""

    def stop(done: int, total: int) -> None:
        if done == blocks * BLOCK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine_to_folder(out, job(), progress=stop, **options)


def changed(**options: Any) -> MiningJob:
    arguments: dict[str, Any] = {**problem(), "zones": ZONES, "picks": PICKS, "block": BLOCK}
    return MiningJob(**arguments | options)


def test_the_folder_holds_what_is_mined(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mined"
    told: list[tuple[int, int]] = []
    outcome = mine_to_folder(out, job(), progress=lambda *event: told.append(event))
    assert told == [(0, 23), (7, 23), (14, 23), (21, 23), (23, 23)]
    assert (outcome.mined, outcome.damaged_blocks) == (QUERIES, 0)
    manifest, mined = read_mined(out)
    assert manifest == outcome.manifest
    assert_same(mined, mine())
    assert (manifest.plan.queries, manifest.plan.items, manifest.plan.tokens, manifest.plan.width) == (23, 40, 2, 8)
    for name in ARRAYS:
        np.testing.assert_array_equal(np.load(out / f"{name}.npy"), getattr(mined, name))
    assert [path.name for path in out.parent.iterdir()] == ["mined"]


def test_without_queries(tmp_path: Path) -> None:
    empty = changed(queries=np.zeros((0, 8), np.float32), targets=np.zeros(0, np.int64), exclude=None)
    assert mine_to_folder(tmp_path / "mined", empty).mined == 0
    _, mined = read_mined(tmp_path / "mined")
    assert mined.picks.shape == (0, PICKS)


def test_a_finished_run_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mined"
    first = mine_to_folder(out, job())
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(MiningJob, "rows", None)
    items = problem()["items"]
    for same in (job(), changed(block=3), changed(threads=2), changed(items=[items[:9], items[9:]])):
        assert mine_to_folder(out, same) == MiningOutcome(manifest=first.manifest, mined=0, damaged_blocks=0)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"picks": 3}, "picks 5 (now 3)"),
        ({"zones": ZoneSpec(lo=0.1, hi=0.9, bounds="pooled", seed=4)}, "lo 0.0 (now 0.1), seed 3 (now 4)"),
        ({"queries": problem(1)["queries"]}, "other queries"),
        ({"items": problem(1)["items"]}, "other gallery"),
        ({"items": problem()["items"].astype(np.float16)}, "other gallery"),
        ({"targets": problem(1)["targets"]}, "other targets"),
        ({"exclude": None}, "other exclude"),
        ({"backend": "reference"}, "backend cpu (now reference)"),
    ],
)
def test_changed_inputs_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    finished, stopped = tmp_path / "finished", tmp_path / "stopped"
    mine_to_folder(finished, job())
    interrupted(stopped, 2)
    before = contents(finished), contents(partial_of(stopped))
    for out in (finished, stopped):
        with pytest.raises(InputError) as refusal:
            mine_to_folder(out, changed(**options))
        assert said in str(refusal.value)
        assert "--force" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert (contents(finished), contents(partial_of(stopped))) == before
    for out in (finished, stopped):
        assert mine_to_folder(out, changed(**options), force=True).mined == QUERIES
    assert contents(finished) == contents(stopped)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    mine_to_folder(tmp_path / "straight", job())
    out = tmp_path / "mined"
    interrupted(out, 2)
    assert not out.exists()
    with pytest.raises(InputError, match=r"unfinished, run dqe-mine again"):
        read_mined(out)
    told: list[int] = []
    outcome = mine_to_folder(out, job(), progress=lambda done, total: told.append(done))
    assert told == [14, 21, 23]
    assert outcome.mined == QUERIES - 2 * BLOCK
    assert contents(out) == contents(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mined", "straight"]


def test_pooled_bounds_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolved once and recorded: a machine that adds in another order goes on with what the run began with."""
    straight = mine_to_folder(tmp_path / "straight", job()).manifest
    assert straight.resolved == job().applied_zones
    assert (straight.plan.zones.bounds, straight.resolved.bounds if straight.resolved else None) == ("pooled", "absolute")
    assert set(mine().lo.tolist()) == {straight.resolved.lo if straight.resolved else None}
    out = tmp_path / "mined"
    interrupted(out, 2)
    monkeypatch.setattr(mining, "resolve_pooled", lambda spec, *_, **__: ZoneSpec(lo=3, hi=4) if spec.bounds == "pooled" else spec)
    assert mine_to_folder(out, job()).manifest == straight
    assert contents(out) == contents(tmp_path / "straight")
    assert mine_to_folder(tmp_path / "anew", job()).manifest.resolved == ZoneSpec(lo=3, hi=4)  # the patch would have told


@pytest.mark.parametrize("bounds", ["absolute", "rank"])
def test_other_bounds_leave_nothing_to_record(bounds: Any, tmp_path: Path) -> None:
    out = tmp_path / "mined"
    same = changed(zones=ZoneSpec(lo=0.1, hi=0.9, bounds=bounds))
    assert mine_to_folder(out, same).manifest.resolved is None
    assert json.loads((out / MANIFEST_FILE).read_text())["resolved"] is None


def as_version_1(path: Path) -> None:
    """As it was written when the plan said what the document was."""
    document = json.loads(path.read_text())
    document["plan"] |= {"kind": "mined-negatives", "schema_version": 1}
    del document["kind"], document["schema_version"]
    if document["resolved"] is None:
        del document["resolved"]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("bounds", ["absolute", "pooled"])
def test_what_the_first_version_wrote_is_read_and_recognised(bounds: Any, tmp_path: Path) -> None:
    out = tmp_path / "mined"
    zones = ZoneSpec(lo=0.1, hi=0.9, bounds=bounds)
    wanted = mine_to_folder(out, changed(zones=zones)).manifest
    as_version_1(out / MANIFEST_FILE)
    manifest, mined = read_mined(out)
    assert manifest == msgspec.structs.replace(wanted, schema_version=1)
    assert_same(mined, mine(zones=zones))
    assert mine_to_folder(out, changed(zones=zones)).mined == 0


def test_a_run_of_the_first_version_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "mined"
    interrupted(out, 2)
    as_version_1(partial_of(out) / "run.json")
    assert mine_to_folder(out, job()).mined == QUERIES - 2 * BLOCK


def test_a_folder_with_the_old_name_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "mined"
    mine_to_folder(out, changed(zones=ZoneSpec(lo=0.1, hi=0.9, bounds="rank")))
    (out / MANIFEST_FILE).write_text((out / MANIFEST_FILE).read_text().replace('"rank"', '"quantile"'))
    with pytest.raises(InputError, match=r"mined\.json: .*'quantile' - at `\$\.plan\.zones\.bounds`; .*'rank' .*'pooled'"):
        read_mined(out)


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_going_on_with_another_block_size(tmp_path: Path, block: int) -> None:
    mine_to_folder(tmp_path / "straight", job())
    out = tmp_path / "mined"
    interrupted(out, 2)
    sorted(partial_of(out).glob("*-*.npy"))[0].unlink()
    assert mine_to_folder(out, changed(block=block)).mined == QUERIES - BLOCK
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_block_is_mined_again(tmp_path: Path, damage: str) -> None:
    mine_to_folder(tmp_path / "straight", job())
    out = tmp_path / "mined"
    interrupted(out, 3)
    block = sorted(partial_of(out).glob("*-*.npy"))[1]
    raw = bytearray(block.read_bytes())
    raw[-3] ^= 1
    block.write_bytes({"flip": bytes(raw), "cut": bytes(raw[:-5]), "empty": b""}[damage])
    outcome = mine_to_folder(out, job())
    assert (outcome.mined, outcome.damaged_blocks) == (QUERIES - 2 * BLOCK, 1)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in ARRAYS), MANIFEST_FILE])
def test_damage_of_a_finished_folder_is_noticed(tmp_path: Path, name: str) -> None:
    out = tmp_path / "mined"
    mine_to_folder(out, job())
    raw = bytearray((out / name).read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (out / name).write_bytes(bytes(raw))
    for attempt in (lambda: read_mined(out), lambda: mine_to_folder(out, job())):
        with pytest.raises(InputError, match=name):
            attempt()
    assert mine_to_folder(out, job(), force=True).mined == QUERIES
    read_mined(out)
    (out / "picks.npy").unlink()
    with pytest.raises(InputError, match=r"picks\.npy: missing or damaged"):
        read_mined(out, verify=False)


def test_a_run_of_which_nothing_is_known_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "mined"
    interrupted(out, 2)
    (partial_of(out) / "run.json").write_text("{}")
    with pytest.raises(InputError, match="--force"):
        mine_to_folder(out, job())
    (partial_of(out) / "run.json").unlink()
    assert mine_to_folder(out, job()).mined == QUERIES


def test_only_mined_folders_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "mined"
    out.mkdir()
    assert mine_to_folder(out, job()).mined == QUERIES  # an empty folder is free
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "manifest.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(InputError, match="photos"):
            mine_to_folder(foreign, job(), force=force)
    assert [path.name for path in foreign.iterdir()] == ["manifest.json"]
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("keep")
    mine_to_folder(tmp_path / "other", job())
    assert (tmp_path / "other.partial" / "mine.txt").read_text() == "keep"


def test_a_folder_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mined" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mined")
    with pytest.raises(InputError, match="no mined negatives here"):
        read_mined(Path())
    (tmp_path / "mined" / "inside").rmdir()
    assert mine_to_folder(Path(), job()).mined == QUERIES
    monkeypatch.chdir(tmp_path / "mined")  # the folder was replaced
    (tmp_path / "mined" / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "mined" / "inside")
    assert read_mined(Path(".."))[1].picks.shape == (QUERIES, PICKS)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    out = tmp_path / "mined"
    interrupted(out, 1)
    descriptor = os.open(partial_of(out), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is mining to this folder"):
        mine_to_folder(out, job())
    os.close(descriptor)
    assert mine_to_folder(out, job()).mined == QUERIES - BLOCK


@pytest.mark.parametrize("what", ["queries", "items", "targets"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_counted_and_refused(tmp_path: Path, what: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining_plan, "_READ_BYTES", 100)  # several chunks
    array = problem()[what] if what != "targets" else mine().anchor_scores
    array[[3, 20]] = value
    name = {"items": "gallery"}.get(what, what)
    with pytest.raises(InputError, match=f"NaN or infinities in 2 of {len(array)} rows of {name}; .*--allow-nan"):
        mine_to_folder(tmp_path / "mined", changed(**{what: array}))
    assert list(tmp_path.iterdir()) == []
    assert mine_to_folder(tmp_path / "mined", changed(**{what: array}), allow_nonfinite=True).manifest.plan.nonfinite == {name: 2}


def test_infinite_bounds_are_refused(tmp_path: Path) -> None:
    """JSON has no infinity."""
    with pytest.raises(InputError, match="finite bounds"):
        mine_to_folder(tmp_path / "mined", changed(zones=ZoneSpec(lo=0, hi=math.inf)))


@pytest.mark.parametrize("limit", [100, 900, 1100])
def test_a_full_disk_is_one_line_and_resumable(tmp_path: Path, limit: int) -> None:
    """900 bytes hold the plan and no block, 1100 hold a block and not all picks."""
    mine_to_folder(tmp_path / "straight", job())
    out = tmp_path / "mined"
    with files_of_at_most(limit), pytest.raises(InputError, match=r"mined: cannot be written \(.*\); raise .*; finished blocks stay"):
        mine_to_folder(out, job())
    assert not out.exists()
    assert not list(tmp_path.glob(".tmp-*"))
    blocks = len(list(partial_of(out).glob("*-*.npy")))
    assert blocks == (4 if limit == 1100 else 0)
    assert mine_to_folder(out, job()).mined == (0 if blocks else QUERIES)
    assert contents(out) == contents(tmp_path / "straight")


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        mine_to_folder(tmp_path / "file" / "mined", job())


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(Path(mining_workers.__file__)) as server:
        yield server


@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_moment_loses_at_most_a_block(server: ForkServer, tmp_path: Path, replacing: bool) -> None:
    """SIGKILL before every single change of the disk, of a first run and of one that replaces an older result."""
    mine_to_folder(tmp_path / "straight", job())
    mine_to_folder(tmp_path / "old", job(lo=0.5))
    expected, old = contents(tmp_path / "straight"), contents(tmp_path / "old")
    seen, most = set(), 0
    for die_before in range(1, 500):
        place = tmp_path / str(die_before)
        place.mkdir()
        out = place / "mined"
        if replacing:
            mine_to_folder(out, job(lo=0.5))
        status = server.run("mine_and_die", out=str(out), die_before=die_before, lo=ZONES.lo, force=replacing)
        blocks = len(list(partial_of(out).glob("*-*.npy")))
        most = max(most, blocks)
        assert blocks >= most or (out / MANIFEST_FILE).exists() or list(place.glob(".tmp-*/old")), "a later kill lost more blocks"
        recover_directory(out)
        if out.exists():
            found = contents(out)
            assert found in (expected, old)
            seen.add("new" if found == expected else "old")
        else:
            assert not replacing
            seen.add("none")
        if status == 0:
            break
        assert status == signal.SIGKILL
        finished = out.exists() and contents(out) == expected
        again = mine_to_folder(out, job(), force=replacing and not finished)
        assert again.mined == (0 if finished else max(QUERIES - blocks * BLOCK, 0))
        assert contents(out) == expected
        assert [path.name for path in place.iterdir()] == ["mined"]
    assert die_before > 30
    assert most == 4
    assert seen == ({"old", "new"} if replacing else {"none", "new"})
