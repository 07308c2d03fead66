"""The latency benchmark on a bundle of a few kilobytes: everybody gives the same answers, and sections are what they say."""

from __future__ import annotations

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import latency, machine
from benchmarks.harness import AnswerMismatchError, Rounds, Turns, interleave
from benchmarks.serving import cold as cold_module
from benchmarks.serving import gallery, searchers, sections, sizing, summary
from benchmarks.serving.cases import COMPILED, EAGER, EAGER_GPU, FLAT, HNSW, INT8, NO_GPU, ONE_VECTOR, OURS, OURS_GPU, ZONES, QueryCase
from benchmarks.serving.checks import ATOL, Answer, compare
from benchmarks.serving.cold import PHASES, cold, start
from benchmarks.serving.setting import KINDS, Kind, Setting, workload
from benchmarks.serving.stages import OTHER, STAGES, TOTAL, measure_block, stages
from benchmarks.serving.targets import targets
from benchmarks.serving.throughput import WORKERS, Load, run_load, throughput
from dqe_engine.engine import STAGES as ENGINE_STAGES
from dqe_engine.errors import InputError
from dqe_engine.processors import affinity
from dqe_training.model.cross_attention import upstream_attention

ROUNDS = Rounds(minimum=1, maximum=1, seconds=0.0)


def quiet(*_: object) -> None:
    return None


# -- answers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5, 12, 20])
def test_exact_contenders_agree(setting: Setting, kind: Kind, batch: int) -> None:
    """Whatever the batch is to the pool of twelve: a part of it, all of it, or more."""
    results = {r.name: r for r in interleave(QueryCase(setting, kind, batch, compiled=False), ROUNDS)}
    for name in (OURS, EAGER, FLAT):
        agreement = results[name].agreement
        assert agreement is not None
        assert (agreement.ok, agreement.same_ids) == (True, 1.0)
        assert agreement.max_error < ATOL
    for name in (HNSW, ONE_VECTOR):
        agreement = results[name].agreement
        assert agreement is not None
        assert 0 < agreement.same_ids <= 1
    assert results[COMPILED].status == results[INT8].status == "left out"
    if not machine.cuda_devices():
        assert results[OURS_GPU].status == results[EAGER_GPU].status == NO_GPU


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_contender_is_noticed(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch with two items' tokens exchanged."""
    targets = np.load(setting.targets_file)
    truth = np.load(setting.truth_file("uploaded"))
    best = int(truth[0].argmax())
    targets[[best, int(truth[0].argmin())]] = targets[[int(truth[0].argmin()), best]]
    np.save(tmp_path / "targets.npy", targets)
    files = dataclasses.replace(searchers.TorchFiles.of(setting), targets=str(tmp_path / "targets.npy"))
    monkeypatch.setattr(searchers, "pytorch", lambda setting, **options: searchers.TorchSearcher(files))
    with pytest.raises(AnswerMismatchError, match="PyTorch eager: scores off by"):
        Turns(QueryCase(setting, "uploaded", 1, compiled=False), ROUNDS, wanted=lambda name: name == EAGER)


TRUTH = np.array([[0.9, 0.8, 0.8, 0.1, -np.inf]])
IDS = {id: at for at, id in enumerate("abcde")}


@pytest.mark.parametrize("ranking", [[("a", 0.9), ("b", 0.8)], [("a", 0.9), ("c", 0.8)], [("a", 0.9), ("b", 0.8 + ATOL / 2)]])
def test_equal_scores_may_change_places(ranking: list[tuple[str, float]]) -> None:
    assert compare(Answer([ranking], exact=True), IDS, TRUTH, 2).ok


@pytest.mark.parametrize(
    ("ranking", "said"),
    [
        ([("a", 0.9), ("d", 0.1)], "scores off by 0.7"),
        ([("b", 0.8), ("a", 0.9)], "scores off by 0.1"),
        ([("a", 0.9), ("b", 0.7)], "scores off by 0.1"),
        ([("a", 0.9)], "a ranking of 1 candidates, expected 2"),
        ([("a", 0.9), ("a", 0.9)], "a ranking of 1 candidates, expected 2"),
        ([("a", 0.9), ("e", 0.5)], "not the reference"),
        ([("a", 0.9), ("nobody", 0.5)], "a ranking of 2 candidates"),
    ],
)
def test_wrong_rankings_say_what_is_wrong(ranking: list[tuple[str, float]], said: str) -> None:
    agreement = compare(Answer([ranking], exact=True), IDS, TRUTH, 2)
    assert not agreement.ok
    assert said in agreement.detail


def test_approximate_rankings_state_their_recall() -> None:
    found = compare(Answer([[("a", 0.5), ("d", 0.4)]], exact=False), IDS, TRUTH, 2)
    assert (found.ok, found.same_ids) == (True, 0.5)
    assert not compare(Answer([], exact=False), IDS, TRUTH, 2).ok
    assert compare(Answer([[(id, float(TRUTH[0, IDS[id]])) for id in "abcd"]], exact=True), IDS, TRUTH, 10).ok  # k beyond the candidates


# -- sections --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [OURS, EAGER, ZONES])
def test_stages_add_up(setting: Setting, name: str, kind: Kind) -> None:
    assert STAGES == ENGINE_STAGES
    block = measure_block(setting, name, kind, 2, 6)
    assert len(block) == 6
    for taken in block:
        whole = taken.pop(TOTAL)
        assert taken.keys() <= {*STAGES, OTHER}
        assert ("vision" in taken and taken["vision"] > 0) == (kind == "uploaded")
        assert sum(taken.values()) == pytest.approx(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_every_way_is_measured_in_its_own_process(setting: Setting) -> None:
    found = stages(setting, queries=2, blocks=3, step=quiet, reached=quiet)
    loaded = throughput(setting, loads=(Load(1, 1), Load(2, 1)), blocks=3, seconds=0.01, step=quiet, reached=quiet)
    if machine.cuda_devices():
        pytest.skip("with a GPU there are more ways")
    assert found["missing"] == loaded["missing"] == {INT8: "left out", OURS_GPU: NO_GPU, EAGER_GPU: NO_GPU}
    assert {(row["kind"], row["name"]) for row in found["rows"]} == {(k, n) for k in KINDS for n in (OURS, EAGER, ZONES)}
    assert all(len(row["stages"][TOTAL]["samples_ms"]) == 6 for row in found["rows"])
    assert {row["name"] for row in loaded["rows"]} == {OURS, EAGER, WORKERS}
    for row in loaded["rows"]:
        assert len(row["blocks_queries_per_s"]) == len(row["blocks"]) == 3
        assert sum(row["blocks"]) == len(row["samples_ms"]) >= 3 * row["callers"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("load", [Load(1, 1), Load(3, 1), Load(1, 12), Load(2, 64)])
def test_every_caller_is_counted(setting: Setting, load: Load) -> None:
    asked: list[int] = []
    ours = searchers.ours(setting, "f32")

    class Counting:
        timings_ms: dict[str, float] = {}  # noqa: RUF012

        def search(self, references: Any, texts: Any, k: int) -> Any:
            asked.append(len(references))
            return ours.search(references, texts, k)

    rate, taken = run_load(Counting(), setting, "catalogue", load, seconds=0.0)
    assert asked == [load.batch] * load.callers  # at least one each, however short the time
    assert len(taken) == load.callers
    assert rate > 0


def test_an_error_of_a_caller_is_not_lost(setting: Setting) -> None:
    class Failing:
        timings_ms: dict[str, float] = {}  # noqa: RUF012

        def search(self, references: Any, texts: Any, k: int) -> Any:
            raise InputError("refused")

    with pytest.raises(InputError, match="refused"):
        run_load(Failing(), setting, "catalogue", Load(2, 1), seconds=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3])
def test_galleries_are_answered_exactly(setting: Setting, tokens: int) -> None:
    assert gallery.tokens_of(setting) == 3
    rows = gallery.measure_series(setting, gallery.Series(tokens, (30, 111), queries=1, blocks=3))
    names = {gallery.name_of(storage, screened) for storage, screened in gallery.STORAGES}
    assert {(row["items"], row["name"]) for row in rows} == {(n, name) for n in (30, 111) for name in names | {EAGER}}
    assert all(row["same_ids"] == 1.0 for row in rows if "f16" not in row["name"])
    assert all(len(row["search_ms"]["samples"]) == 3 and row["search_ms"]["p50"] <= row["total_ms"]["p50"] for row in rows)


@pytest.mark.slow
def test_memory_is_told_apart(setting: Setting) -> None:
    plain, screened = gallery.measure_resident(setting, 20_000, 3, "f32")
    assert (plain["name"], screened["name"]) == ("ours f32", "ours f32 screened")
    assert plain["resident_bytes"] > 20_000 * 3 * 8 * 4 / 2  # most of its pages were touched
    assert all(row["anonymous_bytes"] <= row["resident_bytes"] for row in (plain, screened))
    assert screened["anonymous_bytes"] > plain["anonymous_bytes"]
    assert not (setting.work / "resident").exists()


def test_galleries_that_do_not_fit_are_named(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    need = gallery.bytes_needed(30, 1, 8)
    monkeypatch.setattr(gallery, "available_bytes", lambda: 2 * need)
    rows = gallery.measure_series(setting, gallery.Series(1, (30, 1000), queries=1, blocks=1))
    assert {row["items"] for row in rows if row["status"] == "ok"} == {30}
    assert [row["items"] for row in rows if row["status"] == "skipped: memory"] == [1000]
    monkeypatch.setattr(gallery, "available_bytes", lambda: 0)
    (row,) = gallery.measure_series(setting, gallery.Series(1, (30,), queries=1, blocks=1))
    assert row["status"] == "skipped: memory"


@pytest.mark.slow
def test_cold_starts_reach_every_phase(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start of each way, which is not counted, is the real one; the second gives what it gave."""
    ways: list[str] = []
    real = cache(partial(start, setting))
    monkeypatch.setattr(cold_module, "start", lambda _, way: ways.append(way) or real(way))
    found = cold(setting, repetitions=1, step=quiet, reached=quiet)
    assert ways == ["engine", "torch"] * 2
    for row in found["rows"]:
        (one,) = row["starts"]
        assert tuple(one["phases"]) == PHASES
        times = [phase["ms"] for phase in one["phases"].values()]
        assert times == sorted(times)
        assert 0 < one["phases"]["ready"]["resident_bytes"] <= one["peak_bytes"]
    assert {target.section for target in targets({"cold": found})} == {"cold"}


def test_the_pool_is_gone_through_in_order(setting: Setting) -> None:
    work = workload(setting)
    references, texts = work.batch("catalogue", 1, 8)  # the pool has twelve
    assert texts == [*work.texts[8:], *work.texts[:4]]
    assert references[:4] == [work.ids[row] for row in work.rows[8:]]
    assert work.batch("uploaded", 0, 1)[0] == [(setting.data / "images" / work.ids[work.rows[0]]).read_bytes()]


# -- cost model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [sizing.EncoderSize(2, 128, 8, 65), sizing.EncoderSize(3, 256, 16, 17)])
def test_multiply_adds_are_those_that_pytorch_counts(size: sizing.EncoderSize) -> None:
    """But for the attribute heads and projections, a few per cent."""
    model = sizing.build_encoder(size)
    tokens = torch.zeros(2, size.image_tokens, size.width)
    ids = torch.full((2, sizing.TEXT_LENGTH), 5)
    with torch.inference_mode(), upstream_attention(model.qformer), FlopCounterMode(display=False) as counted:
        model.encode_query(tokens, ids, torch.ones_like(ids))
    assert 2 * sizing.encoder_flops(size) == pytest.approx(counted.get_total_flops(), rel=0.12)
    assert 2 * sizing.encoder_flops(size) < counted.get_total_flops()


def test_the_cost_of_a_search_tells_few_queries_from_many() -> None:
    few, many = sizing.SearchSize(10, 2, 3, 4).terms, sizing.SearchSize(10, 2, 3, 5).terms
    assert few == {"call": 1, "bytes, few queries": 240, "flops, few queries": 480, "bytes, many queries": 0, "flops, many queries": 0}
    assert many == {"call": 1, "bytes, few queries": 0, "flops, few queries": 0, "bytes, many queries": 240, "flops, many queries": 600}


def test_galleries_are_split_over_nodes(setting: Setting) -> None:
    rows = sizing.galleries(setting, {"call": 1e-3, "bytes, few queries": 1e-10})
    by_nodes = {row["nodes"]: row for row in rows if row["items"] == 100_000_000}
    one, four = by_nodes[1], by_nodes[4]
    assert (one["tokens"], one["width"], one["bytes_per_node"]) == (3, 8, 1e8 * 3 * 8 * 4)
    assert one["search_s"] == pytest.approx(1e-3 + 1e-10 * 9.6e9)
    assert four["search_s"] == pytest.approx(1e-3 + 1e-10 * 9.6e9 / 4 + sizing.MERGE_MS / 1e3)


# -- command line ----------------------------------------------------------------------------------------------------------


def arguments(served: Path) -> list[str]:
    return ["--bundle", str(served / "bundle"), "--checkpoint", str(served / "model"), "--data", str(served / "garments")]


def test_what_is_missing_is_one_line(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--bundle", "--checkpoint", "--data"):
        assert latency.main([*arguments(served), option, str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {option} {tmp_path}: no ")
        assert "make demo" in line


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--contenders", "nobody"], "no 'nobody'; there are ours f32"),
        (["--contenders", OURS_GPU], "cannot run here (not run: no GPU)"),
    ],
)
def test_wrong_contenders_are_named(served: Path, extra: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if OURS_GPU in extra and machine.cuda_devices():
        pytest.skip("there is a GPU")
    assert latency.main([*arguments(served), *extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("extra", [["--only", "nothing"], ["--quick", "--full"], ["--threads", "0"], ["--threads", "9999"]])
def test_wrong_options_are_refused(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        latency.main(extra)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_list_names_sections_and_contenders(capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*sections.SECTIONS, OURS, EAGER_GPU))
    assert tuple(sections.SECTIONS) == latency.SECTIONS


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "forked_processes")
def test_a_run_keeps_the_other_sections(
    served: Path, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "_prepared", lambda options, sizes, console: setting)
    for number, name in enumerate(("stages", "query")):
        assert latency.main([*arguments(served), "--quick", "--only", name, "--out", str(tmp_path), "--threads", "1"]) == 0
        results = json.loads((tmp_path / "latency.json").read_bytes())
        assert list(results["sections"]) == (["stages"] if number == 0 else ["query", "stages"])
    assert "end to end (catalogue reference" in capsys.readouterr().out
    record = results["sections"]["query"]
    assert record["machine"]["affinity"] == affinity()
    assert len(record["load_before"]) == 3
    assert {case["case"]["kind"] for case in record["cases"]} == set(KINDS)
    (target,) = results["targets"]
    assert target["asked"] == "≥ 2 ×"
    text = (tmp_path / "latency.md").read_text()
    assert text == summary.markdown(results, targets(results["sections"]))
    assert (tmp_path / "latency-query.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "latency-stages.png").exists()
