"""`dqe_engine.tuning` and `dqe-index tune`: recall is counted right, what is said to be exact is, and bad input is one line."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dqe_engine.cli.index import main
from dqe_engine.index import GalleryIndex
from dqe_engine.tuning import Built, Contender, Setting, contenders, exact, gallery
from dqe_engine.tuning.contenders import F32, Found
from dqe_engine.tuning.frontier import Measured, best, frontier, measure, ranked, recall
from dqe_engine.tuning.gallery import measure_all
from dqe_engine.zones import Screen
from dqe_engine.zones.lists import TokenLists
from dqe_engine.zones.prefix import Prefix

SIZE, TOKENS, WIDTH, K = 1500, 4, 16, 5


@pytest.fixture
def items(rng: np.random.Generator) -> F32:
    found = rng.standard_normal((SIZE, TOKENS, WIDTH)).astype(np.float32)
    found /= np.linalg.norm(found, axis=2, keepdims=True)
    return found


def best_of(items: F32, queries: F32) -> NDArray[np.int64]:
    scores = np.einsum("nmd,bd->bnm", items.astype(np.float64), queries.astype(np.float64)).max(axis=2)
    return np.argsort(-scores, axis=1, kind="stable")[:, :K]


def test_recall_counts_what_scores_as_much_as_the_last_and_nothing_else() -> None:
    truth = (np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[7, 8, 9]]))
    assert recall(truth, truth) == 1.0
    assert recall((np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[7, 8, 4]])), truth) == 1.0, "item 4 is as good as item 9"
    assert recall((np.array([[3.0, 2.0, 0.9]], np.float32), np.array([[7, 8, 4]])), truth) == pytest.approx(2 / 3)
    assert recall((np.array([[3.0, -np.inf, -np.inf]], np.float32), np.array([[7, -1, -1]])), truth) == pytest.approx(1 / 3)


def test_every_way_reaches_the_recall_that_it_says(items: F32, rng: np.random.Generator) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu, of the extra bench")
    queries = rng.standard_normal((20, WIDTH)).astype(np.float32)
    measured, left_out = measure_all(items, queries, k=K, enough=1.0, threads=1)
    assert left_out == {"lists that stop early": "left out: no lists are made for 6,000 tokens"}
    expected = best_of(items, queries)
    names = {row.name for row in measured}
    assert len(names) == 7
    for row in measured:
        ids = ranked(row.setting, queries, K)[1]
        same = np.mean([len(set(a.tolist()) & set(b.tolist())) / K for a, b in zip(ids, expected, strict=True)])
        assert row.recall == pytest.approx(same)
        assert not row.setting.exact or row.recall == 1.0
    assert {name for name in names if max(row.recall for row in measured if row.name == name) < 0.95} == set()


def test_a_ladder_is_climbed_until_it_is_enough_and_the_fastest_that_is_wins() -> None:
    def search(queries: F32, references: NDArray[np.int64], k: int) -> Found:
        return np.ones((len(queries), k), np.float32), np.tile(np.arange(k), (len(queries), 1))

    settings = [Setting({"n": n}, search) for n in range(3)]
    truth = search(np.zeros((4, 2), np.float32), np.zeros(4, np.int64), 2)
    contender = Contender("ours", "", lambda items: Built(1, lambda threads: [settings]))
    rows = measure(
        contender, contender.build(np.zeros((1, 1, 2), np.float32)), 0.0, np.zeros((4, 2), np.float32), truth, threads=1, enough=1.0
    )
    assert [row.setting.values for row in rows] == [{"n": 0}]
    slow, fast, poor = (Measured("", settings[0], found, s, 1, 0.0) for found, s in ((1.0, 2.0), (0.99, 1.0), (0.5, 0.1)))
    assert best([slow, fast, poor], 0.9) is fast
    assert best([slow, fast, poor], 0.999) is slow
    assert best([fast, poor], 0.999) is fast
    worse = Measured("", settings[0], 0.98, 1.5, 1, 0.0)
    assert frontier([slow, worse, fast, poor]) == [poor, fast, slow]


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool, Screen]]:
    """Lists and prefixes for few tokens, no FAISS; and what was built: threads, lists, prefix, and the screen."""
    made: list[tuple[int, bool, bool, Screen]] = []
    build = Screen.build

    def built(items: F32, *, threads: int = 0, lists: bool = True, prefix: bool = True) -> Screen:
        screen = build(items, threads=threads, lists=False, prefix=False)
        shards = (items,)
        screen = dataclasses.replace(
            screen,
            lists=TokenLists.build(shards, threads=1, least=1) if lists else None,
            prefix=Prefix.build(shards, threads=1, least=1, width=16) if prefix else None,
        )
        time.sleep(0.01)
        made.append((threads, lists, prefix, screen))
        return screen

    monkeypatch.setattr(Screen, "build", built)
    monkeypatch.setattr(gallery, "contenders", lambda **options: ())
    monkeypatch.setattr(contenders, "LEAST_TOKENS", 1)
    return made


def test_each_way_has_what_it_says_and_pays_for_it(
    items: F32, ours_alone: list[tuple[int, bool, bool, Screen]], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    select = contenders.select_zones

    def selecting(*args: Any, **options: Any) -> Any:
        asked.append(options["screen"])
        return select(*args, **options)

    monkeypatch.setattr(contenders, "select_zones", selecting)
    measured, left_out = measure_all(items, rng.standard_normal((20, WIDTH)).astype(np.float32), k=K, enough=1.0, threads=1)
    assert not left_out
    assert [one[:3] for one in ours_alone] == [(1, False, False), (1, True, True)]
    build_s = {row.name: row.build_s for row in measured}
    assert build_s["lists that stop early"] >= 0.01
    both = ours_alone[1][3]
    early = [screen for screen in asked if screen is not None and screen.lists is not None and screen is not both]
    assert early
    assert all(screen.prefix is both.prefix and screen.lists.always for screen in early)


def test_tokens_without_a_direction_have_no_early_stop(items: F32, ours_alone: list[Any]) -> None:
    measured, left_out = measure_all(np.zeros_like(items), items[:20, 0].copy(), k=K, enough=1.0, threads=1)
    assert left_out == {"lists that stop early": "left out: most tokens have no direction (their norm is 0), so no lists are made"}
    assert {row.name for row in measured} == {"exact, every token read", "exact, 8-bit copy", "exact, 8-bit copy and lists"}


def test_the_reference_is_left_out(items: F32) -> None:
    setting = (exact("", "", screened=True, lists=False).build(items).ladders(1) or [])[0][0]
    assert setting.search(items[3, :1], np.array([-1]), K)[1][0, 0] == 3
    assert 3 not in setting.search(items[3, :1], np.array([3]), K)[1]


@pytest.fixture
def index(items: F32, tmp_path: Path) -> Path:
    path = tmp_path / "index"
    with GalleryIndex(model_hash="m", target_shape=(TOKENS, WIDTH), image_shape=(1, 1)) as made:
        made.add([str(number) for number in range(SIZE)], items)
        made.remove(["7"])
        made.save(path)
    return path


def test_tune_prints_what_it_measured(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(index), "--sample", "10", "--threads", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["items"], said["queries"], said["k"]) == (SIZE - 1, 10, 10)
    first = said["settings"][0]
    assert (first["name"], first["settings"], first["exact"], first["recall"]) == ("exact, every token read", {}, True, 1.0)
    assert first["bytes"] == 4 * (SIZE - 1) * TOKENS * WIDTH
    assert all(row["recall"] == 1.0 for row in said["settings"] if row["exact"])


def test_tune_takes_embeddings_and_prints_a_table(index: Path, items: F32, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "asked.npy", items[:12, 0])
    assert main(["tune", str(index), "--queries", str(tmp_path / "asked.npy"), "--threads", "1", "--recall", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "12 queries (asked.npy), 1,499 items, the 10 best" in out
    assert "exact, 8-bit copy" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--k", "2000"], "1499 items, but --k asks for the best 2000"),
        (["--recall", "1.5"], "above 0 and up to 1"),
        (["--bundle", "b"], "or leave --bundle out"),
        (["--queries", "asked.jsonl"], "need --bundle"),
        (["--queries", "wide.npy"], "expected float32 of (Q, 16)"),
    ],
)
def test_tune_refuses_in_one_line(
    given: list[str], said: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.zeros((20, WIDTH + 1), np.float32))
    assert main(["tune", str(index), *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
