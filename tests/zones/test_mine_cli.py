"""dqe-mine: what it writes and shows, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.mining_workers import GALLERY, QUERIES, problem
from support.signals import interrupts_heard  # noqa: F401 (used by every test here)

from dqe_engine.cli import mine
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones.mined_folder import read_mined
from dqe_engine.zones.mining import MiningJob, mine_negatives

OPTIONS = ("--lo", "0.1", "--hi", "0.9", "--picks", "5", "--block", "7", "--threads", "1")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder as dqe-data encode writes it."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    arrays = problem()
    for name, array in {**arrays, "gallery": arrays.pop("items")}.items():
        if name != "items":
            np.save(folder / f"{name}.npy", array)
    return folder


def run(*arguments: object) -> int:
    return mine.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], said: str, *arguments: object) -> None:
    """Exit code 2 and one `error:` line that matches `said`."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(said, lines[0]), lines[0]


def test_mining_a_folder(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mined"
    options = (*OPTIONS, "--policy", "softmax", "--temperature", "0.5", "--seed", "7")
    assert run(inputs, "--out", out, *options) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar where there is no terminal
    assert captured.out.splitlines()[-1] == str(out)
    assert "40 items × 2 × 8, shards: 1" in captured.out
    assert "23: 23 mined, 0 were there; backend cpu" in captured.out
    arrays = problem()
    zones = ZoneSpec(lo=0.1, hi=0.9, bounds="pooled", policy="softmax", temperature=0.5, seed=7)
    expected = mine_negatives(arrays.pop("queries"), arrays.pop("items"), arrays.pop("targets"), zones=zones, picks=5, **arrays)
    np.testing.assert_array_equal(np.load(out / "picks.npy"), expected.picks)
    np.testing.assert_array_equal(np.load(out / "counts.npy"), expected.counts)
    medians = ", ".join(f"{name} {np.sort(expected.counts[:, i])[11]}" for i, name in enumerate(("near", "mid", "easy")))
    assert f"zones, median    {medians}" in captured.out
    assert f"all 5 picks      {(expected.picks[:, 4] >= 0).sum()} queries" in captured.out
    assert re.search(r"peak memory      [\d,]+ MiB", captured.out)
    assert run(inputs, "--out", out, *options) == 0
    assert "23: 0 mined, 23 were there" in capsys.readouterr().out


def test_absolute_bounds_and_other_integer_types(inputs: Path, tmp_path: Path) -> None:
    assert run(inputs, "--out", tmp_path / "a", "--bounds", "absolute", "--lo", "-0.5", "--hi", "1.5") == 0
    for name in ("targets", "exclude"):
        np.save(inputs / f"{name}.npy", np.load(inputs / f"{name}.npy").astype(np.uint16))
    assert run(inputs, "--out", tmp_path / "b", "--bounds", "absolute", "--lo", "-0.5", "--hi", "1.5") == 0
    a, b = (read_mined(tmp_path / name) for name in "ab")
    assert a[0] == b[0]
    assert (a[1].lo == -0.5).all()
    assert a[1].picks.shape == (QUERIES, 16)


def test_shards_as_files_and_as_a_folder_in_natural_order(inputs: Path, tmp_path: Path) -> None:
    assert run(inputs, "--out", tmp_path / "whole", *OPTIONS) == 0
    shards = tmp_path / "shards"
    shards.mkdir()
    items = np.load(inputs / "gallery.npy")
    for number in range(11):  # part-10 comes after part-9, not after part-1
        np.save(shards / f"part-{number}.npy", items[number * 4 : (number + 1) * 4 if number < 10 else None])
    files = [shards / f"part-{number}.npy" for number in range(11)]
    assert run(inputs, "--gallery", *files, "--out", tmp_path / "files", *OPTIONS) == 0
    assert run(inputs, "--gallery", shards, "--out", tmp_path / "folder", *OPTIONS) == 0
    (inputs / "gallery.npy").unlink()
    shards.rename(inputs / "gallery")
    assert run(inputs, "--out", tmp_path / "inside", *OPTIONS) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for name in ("files", "folder", "inside"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == whole


def test_anchor_scores_instead_of_targets(inputs: Path, tmp_path: Path) -> None:
    scores = np.full(QUERIES, 0.5, np.float32)
    np.save(tmp_path / "scores.npy", scores)
    options = ("--bounds", "absolute", "--lo", "0", "--hi", "1", "--queries", inputs / "queries.npy", "--gallery", inputs / "gallery.npy")
    assert run("--anchor-scores", tmp_path / "scores.npy", "--out", tmp_path / "mined", *options) == 0
    _, mined = read_mined(tmp_path / "mined")
    np.testing.assert_array_equal(mined.anchor_scores, scores)
    assert (mined.counts.sum(axis=1) == GALLERY).all()  # nothing was excluded


def test_showing(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "mined"
    refused(capsys, "mined: no mined negatives here", "--show", out)
    assert run(inputs, "--out", out, *OPTIONS) == 0
    manifest, mined = read_mined(out)
    applied = manifest.resolved
    assert applied is not None
    capsys.readouterr()
    assert run("--show", out, "--rows", "2") == 0
    shown = capsys.readouterr().out
    assert f"pooled 0.1 to 0.9 (Δ {applied.lo:.4f} to {applied.hi:.4f}); 5 picks, uniform, seed 0" in shown
    assert "first 2 queries" in shown
    for item, score in zip(mined.picks[1].tolist(), mined.pick_scores[1].tolist(), strict=True):
        assert f"{item} ({mined.anchor_scores[1] - score:.4f})" in shown
    line = next(line for line in shown.splitlines() if line.strip("│ ").startswith("mid"))
    assert [int(cell) for cell in line.strip("│ ").split("│")[1:]][::3] == np.sort(mined.counts[:, 1])[[0, 11, 22]].tolist()
    assert run("--show", out, "--rows", "100") == 0
    assert "first 23 queries" in capsys.readouterr().out
    (out / "picks.npy").write_bytes(b"")
    refused(capsys, r"picks\.npy: missing or damaged", "--show", out)


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, calls = MiningJob.rows, []

    def interrupted(self: MiningJob, start: int, stop: int) -> object:
        calls.append(start)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return rows(self, start, stop)

    monkeypatch.setattr(MiningJob, "rows", interrupted)
    assert run(inputs, "--out", tmp_path / "mined", *OPTIONS) == 130
    assert capsys.readouterr().err.strip() == "interrupted: 14 of 23 queries are done; run the same command to go on"
    assert run(inputs, "--out", tmp_path / "mined", *OPTIONS) == 0
    assert "23: 9 mined, 14 were there" in capsys.readouterr().out
    assert calls == [0, 7, 14, 14, 21]
    np.save(inputs / "targets.npy", (np.load(inputs / "targets.npy") + 1) % GALLERY)
    with monkeypatch.context() as patch:
        patch.setattr("dqe_engine.zones.mining_plan._nonfinite_rows", lambda chunk: signal.raise_signal(signal.SIGINT))
        assert run(inputs, "--out", tmp_path / "mined", *OPTIONS) == 130
    assert capsys.readouterr().err.strip() == "interrupted: while reading the inputs; run the same command to go on"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "mined"]


def test_a_killed_process_is_gone_on_with(tmp_path: Path, inputs: Path) -> None:
    """The real command, killed while it mines."""
    np.save(inputs / "gallery.npy", np.tile(problem()["items"], (500, 1, 1)))
    assert run(inputs, "--out", tmp_path / "straight", *OPTIONS, "--block", "1") == 0
    command = [sys.executable, "-m", "dqe_engine.cli.mine", str(inputs), "--out", str(tmp_path / "mined"), *OPTIONS, "--block", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    partial, deadline = tmp_path / "mined.partial", time.monotonic() + 60
    while len(list(partial.glob("*-*.npy"))) < 3 and not (tmp_path / "mined").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    found = len(list(partial.glob("*-*.npy")))
    assert found >= 3
    assert not (tmp_path / "mined").exists()
    assert run(inputs, "--out", tmp_path / "mined", *OPTIONS, "--block", "1") == 0
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "mined" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "mined", "straight"]


def test_damaged_blocks_are_told(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dqe_engine.zones.mining_folder.assemble", None)
        with pytest.raises(TypeError):
            run(inputs, "--out", tmp_path / "mined", *OPTIONS)
    block = next((tmp_path / "mined.partial").glob("*-*.npy"))
    block.write_bytes(block.read_bytes()[:-1])
    assert run(inputs, "--out", tmp_path / "mined", *OPTIONS) == 0
    assert capsys.readouterr().err == "damaged blocks of the interrupted run, mined again: 1\n"


# -- mistakes ----------------------------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def saved(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change an array of the inputs."""

    def apply(inputs: Path) -> None:
        np.save(inputs / f"{name}.npy", change(np.load(inputs / f"{name}.npy")))

    return apply


def set_row(array: np.ndarray, row: int, value: float) -> np.ndarray:
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "queries.npy").unlink(), r"queries\.npy: no such file"),
        (lambda d: (d / "gallery.npy").unlink(), r"gallery\.npy: no such file"),
        (lambda d: (d / "targets.npy").write_bytes(b""), r"targets\.npy: not a whole \.npy file"),
        (lambda d: (d / "gallery.npy").write_bytes((d / "gallery.npy").read_bytes()[:900]), r"gallery\.npy: not a whole \.npy file"),
        (lambda d: (d / "queries.npy").write_text("1,2,3"), r"queries\.npy: not a whole \.npy file"),
        (lambda d: np.save(d / "queries.npy", np.array([{}]), allow_pickle=True), r"queries\.npy: not a whole \.npy file"),
        (lambda d: np.savez(open(d / "queries.npy", "wb"), a=1), r"queries\.npy: an \.npz archive"),  # noqa: SIM115
        (lambda d: (d / "queries.npy").unlink() or (d / "queries.npy").mkdir(), r"queries\.npy: is a directory; expected a file"),
        (lambda d: (d / "gallery.npy").unlink() or (d / "gallery").mkdir(), r"gallery: no \.npy files in this folder"),
        (saved("queries", lambda a: a.astype(float)), r"queries\.npy: dtype float64, expected float32; convert"),
        (saved("queries", lambda a: a.astype(">f4")), r"queries\.npy: dtype >f4, expected float32"),
        (saved("queries", lambda a: a[0]), r"queries\.npy: shape \(8,\), expected 2 dimensions"),
        (saved("queries", np.asfortranarray), r"queries\.npy: in Fortran order"),
        (saved("queries", lambda a: a[:, :5].copy()), r"gallery\.npy: shape \(40, 2, 8\), D=8; the queries have D=5"),
        (saved("queries", lambda a: set_row(a, 4, np.nan)), r"NaN or infinities in 1 of 23 rows of queries; .*--allow-nan"),
        (saved("gallery", lambda a: set_row(a, 4, np.inf)), r"NaN or infinities in 1 of 40 rows of gallery"),
        (saved("gallery", lambda a: (a * 8).astype(np.int8)), r"gallery\.npy: dtype int8, expected float32 or float16"),
        (saved("targets", lambda a: a.astype(np.float32)), r"targets\.npy: dtype float32, expected integers"),
        (saved("targets", lambda a: a[:20]), r"targets: 20 entries, expected 23"),
        (saved("targets", lambda a: set_row(a, 4, 40)), r"targets: 1 of 23 ids are not positions .*\(0 to 39\); the first is 40, in row 4"),
        (saved("exclude", lambda a: set_row(a, 4, 77)), r"exclude: 1 of 23 ids are not positions .*; the first is 77, in row 4"),
        (saved("exclude", lambda a: a[:, 0]), r"exclude\.npy: shape \(23,\), expected 2 dimensions"),
        (saved("exclude", lambda a: a[:9]), r"exclude: 9 entries, expected 23"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, said: str) -> None:
    change(inputs)
    refused(capsys, said, inputs, "--out", tmp_path / "mined")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lo", "0.9", "--hi", "0.1"], "lo <= hi"),
        (["--lo", "nan"], "lo <= hi"),
        (["--hi", "2"], r"pooled bounds must lie in \[0, 1\]"),
        (["--bounds", "absolute", "--hi", "inf"], "finite bounds"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--seed", "-1"], "seed must fit 64 bits"),
        (["--queries", "nowhere.npy"], r"nowhere\.npy: no such file"),
        (["--exclude", "nowhere.npy"], r"nowhere\.npy: no such file"),
        (["--targets", "a.npy", "--anchor-scores", "b.npy"], "not both"),
        (["--backend", "cuda"], "cuda"),
    ],
)
def test_options_that_do_not_fit(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    refused(capsys, said, inputs, "--out", tmp_path / "mined", *options)


def test_shards_that_do_not_fit_each_other(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = np.load(inputs / "gallery.npy")
    for name, shard in (("half", items.astype(np.float16)), ("one", items[:, :1]), ("plain", items[:, 0])):
        np.save(tmp_path / f"{name}.npy", shard)
        refused(
            capsys, rf"{name}\.npy: float\d\d \(.*\) per item, but .*gallery\.npy has float32 \(2, 8\)",
            inputs, "--gallery", inputs / "gallery.npy", tmp_path / f"{name}.npy", "--out", tmp_path / "mined",
        )  # fmt: skip


def test_out_that_cannot_be_used(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, "file/mined: cannot be written", inputs, "--out", tmp_path / "file" / "mined")
    refused(capsys, "file exists already", inputs, "--out", tmp_path / "file")
    refused(capsys, "file is not a directory", inputs, "--out", tmp_path / "file", "--force")
    refused(capsys, "holds files but no mined.json", inputs, "--out", inputs, "--force")
    out = tmp_path / "mined"
    assert run(inputs, "--out", out, *OPTIONS) == 0
    refused(capsys, r"picks 5 \(now 6\); choose another folder, or replace it with --force", inputs, "--out", out, *OPTIONS, "--picks", "6")
    assert run(inputs, "--out", out, *OPTIONS, "--picks", "6", "--force") == 0
    assert np.load(out / "picks.npy").shape == (QUERIES, 6)
    record = json.loads((out / "mined.json").read_text())
    record["schema_version"] = 3
    (out / "mined.json").write_text(json.dumps(record))
    refused(capsys, "schema version 3 is newer than the supported 2; upgrade", "--show", out)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may write anywhere, and there is no setpriv")
def test_a_read_only_folder(inputs: Path, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir(mode=0o555)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []  # root without its privileges
    command = [*drop, sys.executable, "-m", "dqe_engine.cli.mine", str(inputs), "--out", str(place / "mined")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .*/mined: cannot be written \(Permission denied\); .*\n", result.stderr)


def test_nan_may_be_allowed(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("queries", lambda a: set_row(a, 4, np.nan))(inputs)
    assert run(inputs, "--out", tmp_path / "mined", *OPTIONS, "--allow-nan") == 0
    captured = capsys.readouterr()
    assert captured.err == "rows with NaN or infinities in queries: 1\n"
    assert re.search(r"empty mid zone +1 queries", captured.out)
    assert run("--show", tmp_path / "mined") == 0
    assert "rows of queries: 1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["inputs"], ["inputs", "--out", "a", "--show", "b"]])
def test_either_out_or_show(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        mine.main(arguments)
    assert "give either --out OUT, to mine, or --show OUT" in capsys.readouterr().err


def test_without_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "--queries FILE is missing; add it, or give a folder INPUTS that holds queries.npy", "--out", tmp_path / "mined")
