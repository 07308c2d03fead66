"""Sharded indexes without Ray: every answer is the single index's, whatever the cut; losses are told; updates are followed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.samples import image_rows, query_rows, target_rows, unit

from dqe_engine.cli import index as index_command
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, IndexConflictError, IndexFormatError, InputError, NoAnswerError
from dqe_engine.index import GalleryIndex, IndexMatches
from dqe_engine.index.merging import best_scores, merge_answers, merged
from dqe_engine.index.shard_files import SHARDS_FILE, cut_index, join_indexes, read_shards
from dqe_engine.index.shard_server import ShardServer
from dqe_engine.index.sharded import ShardedIndex
from dqe_engine.index.snapshot import Match
from dqe_engine.index.transports import HereTransport, Lost
from dqe_engine.query import Query

MakeIndex = Callable[..., GalleryIndex]
FILTERS: tuple[Any, ...] = (
    None,
    {"n": {"<": 10}},
    {"n": {"<": 0}},
    {"brand": "a"},
    {"or": [{"brand": "b"}, {"n": {"exists": False}}]},
    {"not": [{"brand": "a"}]},
)


class Breaking(HereTransport):
    """Some of its shards give no answer, or none from the second round on."""

    dead: frozenset[int] = frozenset()
    dying: frozenset[int] = frozenset()

    def ask(self, calls: Sequence[tuple[int, tuple[Any, ...]]], timeout: float) -> list[Any]:
        replies: list[Any] = list(super().ask(calls, timeout))
        if any(call[1][0] == "search" and call[1][7] is not None for call in calls):  # zones: the second round
            self.dead, self.dying = self.dead | self.dying, frozenset()
        return [Lost("switched off") if slot in self.dead else reply for (slot, _), reply in zip(calls, replies, strict=True)]


def breaking(place: Path, **options: Any) -> tuple[ShardedIndex, Breaking]:
    transport = Breaking(place, read_shards(place).model_hash)
    return ShardedIndex(place, transport, **options), transport


def filled(make_index: MakeIndex, rng: np.random.Generator, size: int, *, kinds: int, **options: Any) -> GalleryIndex:
    """Items of which many are equal: `kinds` different token rows, and metadata that some lack."""
    index = make_index(**options)
    if size:
        rows = target_rows(kinds, 5)[rng.integers(0, kinds, size)]
        metadata = [None if n % 7 == 3 else {"n": n, "brand": "ab"[n % 2]} for n in range(size)]
        index.add([f"i{n}" for n in range(size)], rows, image_rows(size) if index.image_storage != "none" else None, metadata)
    return index


def compacted(index: GalleryIndex, place: Path) -> GalleryIndex:
    index.save(place)
    index.compact()
    return index


def alone(index: GalleryIndex, queries: np.ndarray, k: int, *, exclude: Any = None, **options: Any) -> tuple[IndexMatches, ...]:
    """Each query by itself: in larger batches the last bits of a score depend on the others."""
    return tuple(
        index.search(queries[b : b + 1], k, exclude=None if exclude is None else exclude[b : b + 1], **options)[0]
        for b in range(len(queries))
    )


def assert_same(sharded: ShardedIndex, single: GalleryIndex, rng: np.random.Generator) -> None:
    assert len(sharded) == len(single)
    ids = list(single.ids) or ["none"]
    queries = np.concatenate([query_rows(3, int(rng.integers(100))), np.zeros((1, 4), np.float32), -target_rows(1, 5)[:, 0]])
    for filter in FILTERS:
        assert sharded.count(filter) == single.count(filter)
        exclude = [[*rng.choice(ids, min(len(ids), 5)), "unknown"] for _ in queries]
        for options in ({}, {"exclude": exclude}):
            k = int(rng.choice([1, 2, 10, len(ids) + 3]))
            assert sharded.search(queries, k, filter=filter, **options) == alone(single, queries, k, filter=filter, **options)
            for lo, hi in ((0.0, 0.0), (0.01, 0.4), (-1.0, 0.1), (0.0, float("inf")), (-float("inf"), float("inf"))):
                spec = ZoneSpec(lo=lo, hi=hi, policy="hardest")
                found = sharded.search(queries, k, filter=filter, zones=spec, picks=k, **options)
                assert found == alone(single, queries, k, filter=filter, zones=spec, picks=k, **options)


@pytest.mark.parametrize("storage", ["f32", "f16"])
@pytest.mark.parametrize(("size", "kinds", "shards"), [(0, 1, 2), (1, 1, 3), (5, 5, 7), (40, 1, 3), (60, 4, 2), (150, 90, 4)])
def test_every_answer_is_the_single_indexs(
    size: int, kinds: int, shards: int, storage: str, make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Empty shards, items that are all equal, k beyond N, filters that pass nothing, zero queries, ties within and between shards."""
    single = compacted(filled(make_index, rng, size, kinds=kinds, storage=storage), tmp_path / "whole")
    cut = cut_index(single, tmp_path / "cut", shards)
    assert [shard.items for shard in cut.shards] == [size * (n + 1) // shards - size * n // shards for n in range(shards)]
    with ShardedIndex.open_here(tmp_path / "cut") as sharded:
        assert_same(sharded, single, rng)


def test_large_shards_with_and_without_screens_give_the_same(make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> None:
    """Other blocks of items, other paths through the kernels: scores are equal to the bit."""
    single = make_index(5000)
    single.save(tmp_path / "whole")
    cut_index(single, tmp_path / "cut", 3)
    queries = query_rows(9)
    for screened in (True, False):
        with ShardedIndex.open_here(tmp_path / "cut", screened=screened) as sharded:
            for some in (queries[:1], queries):
                for filter in (None, {"n": {"exists": False}}):
                    assert sharded.search(some, 40, filter=filter) == alone(single, some, 40, filter=filter)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.5, 0.25, 0.0, -0.0, -1.0, float("inf"), -float("inf")]), max_size=6), min_size=1, max_size=5),
    st.integers(0, 12),
)
def test_merging_is_one_stable_sort(scores: list[list[float]], most: int) -> None:
    parts, number = [], 0
    for shard in scores:
        ranked = sorted(enumerate(shard, number), key=lambda pair: -pair[1])
        parts.append([Match(str(item), score, None) for item, score in ranked])
        number += len(shard)
    whole = sorted(enumerate(score for shard in scores for score in shard), key=lambda pair: -pair[1])
    assert [(match.id, match.score) for match in merged(parts, most)] == [(str(item), score) for item, score in whole[:most]]
    found = {n: [IndexMatches(tuple(part))] for n, part in enumerate(parts)}
    best = best_scores(found, 1)
    assert best[0] == whole[0][1] if whole else np.isnan(best[0])
    assert merge_answers(found, None, queries=1, k=most, picks=0)[0].matches == merged(parts, most)


def test_a_lost_shard_is_an_error_or_a_partial_answer_that_says_so(make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> None:
    single = compacted(filled(make_index, rng, 60, kinds=50), tmp_path / "whole")
    cut = cut_index(single, tmp_path / "cut", 3)
    names = [shard.name for shard in cut.shards]
    queries, spec = query_rows(3), ZoneSpec(lo=0.1, hi=0.5, policy="hardest")
    middle = [f"i{n}" for n in range(20, 40)]
    without = single.search(queries, 9, exclude=[middle] * 3, zones=spec, picks=9)

    strict, transport = breaking(tmp_path / "cut")
    transport.dead = frozenset({1})
    with pytest.raises(
        NoAnswerError, match=rf"^shard {names[1]} of 3 gave no answer, so the search has no answer \(switched off\); look at "
    ):
        strict.search(queries, 9)

    for late in (False, True):  # also one that is lost between the rounds, perhaps with the best hit
        partial, transport = breaking(tmp_path / "cut", on_loss="partial")
        setattr(transport, "dying" if late else "dead", frozenset({1}))
        found = partial.search(queries, 9, zones=spec, picks=9)
        assert [(one.matches, one.zone_counts, one.picks) for one in found] == [
            (one.matches, one.zone_counts, one.picks) for one in without
        ]
        assert {(one.exact, one.lost) for one in found} == {(False, (names[1],))}
    assert partial.get(["i3"])[0].metadata is None
    with pytest.raises(BackendError, match="whether 'i25' is in the index is not known"):
        partial.get(["i25"])
    with pytest.raises(BackendError, match="cannot be counted"):
        partial.count()
    transport.dead = frozenset(range(3))
    with pytest.raises(BackendError, match="and 2 more of 3 gave no answer"):
        partial.search(queries, 9)


def test_updates_are_followed_and_states_are_never_mixed(make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> None:
    whole, place = tmp_path / "whole", tmp_path / "cut"
    single = filled(make_index, rng, 40, kinds=30, image_storage="f16")
    single.save(whole)
    cut_index(single, place, 3)
    sharded = ShardedIndex.open_here(place)
    before, queries = sharded.snapshot(), query_rows(2)
    old = single.search(queries, 50)
    single.remove(["i0", "i39"])
    single.update_metadata({"i5": {"n": 500}})
    single.add(["new", "i20"], target_rows(2, 8), image_rows(2, 8), contents=["a" * 32, None], replace=True)
    with pytest.raises(InputError, match="not saved"):
        cut_index(single, place, 3)
    single.save(whole)
    names = [shard.name for shard in read_shards(place).shards]
    cut = cut_index(single, place, 3)
    assert [shard.name for shard in cut.shards] == names, "changed in place"
    assert sharded.search(queries, 50) == old, "before a refresh"
    assert sharded.refresh()
    assert not sharded.refresh()
    assert_same(sharded, single, rng)
    assert before.search(queries, 50) == old
    assert sharded.get(["new", "i20", "i5", "i7"]) == single.get(["new", "i20", "i5", "i7"]), "metadata and content hashes too"
    for id in ("new", "i20", "i5", "i7"):
        row = sharded.snapshot().row(id)
        assert row is not None
        np.testing.assert_array_equal(sharded.snapshot().target_tokens(row), single.target_tokens(id))
        np.testing.assert_array_equal(sharded.snapshot().image_tokens(row), single.image_tokens(id))
    fresh = ShardedIndex.open_here(place)  # a restarted process: it has the new revisions alone
    assert_same(fresh, single, rng)
    stale = ShardedIndex.open_here(place)
    stale._now = before.__class__(before.set, stale._transport, "error", 30.0)
    stale._transport._servers.clear()  # as of a process that was started again
    with pytest.raises(BackendError, match="it was changed meanwhile; refresh"):
        stale.search(queries, 5)
    single.compact()
    cut = cut_index(single, place, 3)
    assert not {shard.name for shard in cut.shards} & set(names), "cut anew beside the old one"
    assert all((place / name).is_dir() for name in names), "for readers that have just read shards.json"
    assert sharded.refresh()
    assert_same(sharded, single, rng)
    cut_index(single, place, 5)
    assert not any((place / name).exists() for name in names)
    assert sharded.refresh()
    assert_same(sharded, single, rng)


def test_an_update_that_was_killed_is_run_again(
    make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = filled(make_index, rng, 30, kinds=9)
    single.save(tmp_path / "whole")
    cut_index(single, tmp_path / "cut", 3)
    single.add(["i3", "later"], target_rows(2, 3), replace=True)
    single.save(tmp_path / "whole")
    save = GalleryIndex.save
    for allowed in range(3):
        left = [allowed]

        def killed(self: GalleryIndex, *args: Any, left: list[int] = left, **options: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            save(self, *args, **options)

        monkeypatch.setattr(GalleryIndex, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            cut_index(single, tmp_path / "cut", 3)
        monkeypatch.undo()
    cut_index(single, tmp_path / "cut", 3)
    with ShardedIndex.open_here(tmp_path / "cut") as sharded:
        assert_same(sharded, single, rng)


def test_indexes_are_joined_and_an_item_is_in_one_of_them(make_index: MakeIndex, tmp_path: Path, rng: np.random.Generator) -> None:
    single, rows = make_index(), target_rows(30)
    single.add([f"i{n}" for n in range(30)], rows)
    for n in range(3):
        part = make_index()
        part.add([f"i{m}" for m in range(10 * n, 10 * n + 10)], rows[10 * n : 10 * n + 10])
        part.save(tmp_path / "joined" / f"part-{n}")
    joined = join_indexes(tmp_path / "joined")
    assert [shard.name for shard in joined.shards] == ["part-0", "part-1", "part-2"]
    with ShardedIndex.open_here(tmp_path / "joined") as sharded:
        assert_same(sharded, single, rng)
        more = GalleryIndex.load(tmp_path / "joined" / "part-2")
        more.remove(["i29"])
        single.remove(["i29"])
        more.save(tmp_path / "joined" / "part-2")
        join_indexes(tmp_path / "joined")
        sharded.refresh()
        assert_same(sharded, single, rng)
    more.add(["i3"], rows[:1])
    more.save(tmp_path / "joined" / "part-2")
    with pytest.raises(InputError, match="'i3' is in part-0 and in part-2"):
        join_indexes(tmp_path / "joined")
    single.save(tmp_path / "whole")
    with pytest.raises(IndexFormatError, match="joined from separate indexes"):
        cut_index(single, tmp_path / "joined", 2)
    make_index(3, storage="f16").save(tmp_path / "joined" / "part-3")
    with pytest.raises(IndexFormatError, match="differ in model, shapes or precision"):
        join_indexes(tmp_path / "joined")


def test_what_is_refused(make_index: MakeIndex, tmp_path: Path) -> None:
    single = make_index(8)
    single.save(tmp_path / "whole")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("mine")
    with pytest.raises(IndexConflictError, match=r"holds other things \('a.txt'\)"):
        cut_index(single, tmp_path / "other", 2)
    with pytest.raises(IndexFormatError, match=r"no sharded index here \(shards.json is missing\)"):
        ShardedIndex.open_here(tmp_path / "whole")
    cut_index(single, tmp_path / "cut", 2)
    with ShardedIndex.open_here(tmp_path / "cut") as sharded:
        for options, message in (
            ({"zones": ZoneSpec(lo=0, hi=1, policy="uniform"), "picks": 3}, "random draws need the rows of one index"),
            ({"zones": ZoneSpec(lo=0, hi=1, bounds="rank")}, "give absolute bounds"),
            ({"exclude": [[], []]}, "2 exclusions for 1 queries"),
            ({"filter": {"a": {"like": 1}}}, "unknown operator"),
        ):
            with pytest.raises(InputError, match=message):
                sharded.search(query_rows(1), 2, **options)
        with pytest.raises(InputError, match="1 ids are not in the index: 'x'"):
            sharded.get(["i1", "x"])
    with pytest.raises(InputError, match="closed"):
        sharded.search(query_rows(1), 2)
    document = json.loads((tmp_path / "cut" / SHARDS_FILE).read_text())
    document["shards"][0]["name"] = "../whole"
    (tmp_path / "cut" / SHARDS_FILE).write_text(json.dumps(document))
    with pytest.raises(IndexFormatError, match="not the name of a folder"):
        read_shards(tmp_path / "cut")


def test_a_server_that_starts_anew_answers_as_before(make_index: MakeIndex, tmp_path: Path) -> None:
    single = make_index(8)
    single.save(tmp_path / "a")
    revision = single.snapshot().revision
    arguments = (query_rows(1), 3, None, None, None, 0, None)
    replies = [ShardServer(str(tmp_path), "m" * 32).call("search", "a", str(revision), *arguments) for _ in range(2)]
    assert replies[0] == replies[1] == ("answer", single.search(query_rows(1), 3))
    (tmp_path / "a" / "manifest.json").unlink()
    state, reason = ShardServer(str(tmp_path), "m" * 32).call("search", "a", str(revision), *arguments)
    assert state == "lost"
    assert "manifest.json is missing" in reason


def test_the_engine_searches_shards_as_it_does_one_index(
    engine: RetrievalEngine, bundle_path: Path, image_folder: Path, tmp_path: Path
) -> None:
    engine.new_index(image_storage="f32")
    engine.index_images(image_folder, metadata={f"{n:02}.png": {"even": True} for n in range(0, 12, 2)})
    engine.save_index(tmp_path / "whole")
    cut_index(engine.index, tmp_path / "cut", 3)
    other = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    other.attach(ShardedIndex.open_here(tmp_path / "cut"))
    queries = [
        Query(reference_id="02.png", text="in red", k=4, explain=True),
        Query(reference_id="sub/03.png", k=3, offset=2, zones=True),
        Query(text="in red", unlike=["04.png"], exclude=["06.png"], weights={engine.bundle.vocabulary.names[0]: 2.0}, k=20),
        Query(image=image_folder / "00.png", text="dots", filter={"even": True}, zones=True, minimum_score=-0.5, k=5),
    ]
    for one, single in zip(other.search_batch(queries), engine.search_batch(queries), strict=True):
        assert (one.hits, one.zones, one.weights, one.mode, one.exact, one.lost) == (
            single.hits,
            single.zones,
            single.weights,
            single.mode,
            True,
            (),
        )
        assert one.index.items == 12
    steps = [made.dialogue(queries[0]) for made in (other, engine)]
    for dialogue in steps:
        dialogue.refine("with dots")
        dialogue.unlike("08.png")
    assert steps[0].result.hits == steps[1].result.hits
    with other.batcher() as batcher:
        assert batcher.search(queries[3]).hits == engine.search(queries[3]).hits
    with pytest.raises(InputError, match="attach a GalleryIndex"):
        other.save_index(tmp_path / "no")
    with pytest.raises(InputError, match="'nothing' is not an id of the index"):
        other.search(Query(reference_id="nothing"))


def test_the_commands(make_index: MakeIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_index(10).save(tmp_path / "whole")
    shard = ["shard", str(tmp_path / "whole"), str(tmp_path / "cut")]
    assert index_command.main([*shard, "--shards", "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cut'}: 10 items of {tmp_path / 'whole'} in 3 shards of 3, 3 and 4\n"
    assert index_command.main(shard) == 0, "as many as there are"
    assert "in 3 shards" in capsys.readouterr().out
    assert index_command.main(["shard", str(tmp_path / "whole"), str(tmp_path / "new")]) == 2
    assert "--shards" in capsys.readouterr().err
    assert index_command.main(["join", str(tmp_path / "cut")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cut'}: 10 items in 3 shards of 3, 3 and 4\n"
    assert index_command.main(["join", str(tmp_path / "nothing")]) == 2
    assert "expected at least one index" in capsys.readouterr().err
    assert index_command.main(shard) == 2
    assert "--force" in capsys.readouterr().err
    assert index_command.main([*shard, "--force", "--shards", "2"]) == 0
    assert "2 shards of 5 and 5" in capsys.readouterr().out


def test_equal_items_in_all_shards_come_in_the_order_of_age(make_index: MakeIndex, tmp_path: Path) -> None:
    single = make_index()
    single.add([f"z{9 - n}" for n in range(9)], np.repeat(unit(np.ones((1, 2, 4))), 9, axis=0))
    single.save(tmp_path / "whole")
    cut_index(single, tmp_path / "cut", 4)
    with ShardedIndex.open_here(tmp_path / "cut") as sharded:
        found = sharded.search(query_rows(1), 5)[0].matches
    assert [match.id for match in found] == ["z9", "z8", "z7", "z6", "z5"]
    assert len({match.score for match in found}) == 1
