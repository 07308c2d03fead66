"""One run: what is wrong with the inputs is said first, then stage by stage; whatever is done is found by the next run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.errors import InputError, ParityError
from dqe_engine.index import GalleryIndex
from dqe_engine.sessions import Provider
from dqe_training.data.public.wording import PLAIN, WORDINGS, Wording, wording_of
from dqe_training.evaluation.benchmarks import aspect_figures, ranking_figures
from dqe_training.evaluation.submission import submission, write_submission
from dqe_training.importing import ImportOptions

from .encoding import Encoded, State, encode, open_encoded, read_state
from .figures import Rows, difference, measures_of, rows_of, summarise
from .keys import key_of
from .published import SOURCES, SPLITS, Published, published_row
from .ranking import Rank, rank_arrays, rank_index, write_index
from .results import RESULTS, TABLE, Earlier, Paired, PublishedRow, Results, RowResult, ViewResult, asked_of, write_answers, write_results
from .source import ROWS, Source, open_source, provenance, source_key
from .stages import Places, check_disk, make_bundle, make_model, needed_bytes, open_row
from .table import markdown
from .work import Seen, Work, find_annotations, plan_work

_LIBRARIES = ("dqe-engine", "torch", "transformers", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Wish:
    """What a user asks for; fields as the options of dqe-reproduce. `rows`: names of `ROWS`, () for all that the weights can have.
    `wording`: a name of `WORDINGS`, None for that of the weights' layout."""

    dataset: str
    weights: Path
    images: Path
    annotations: Path | None = None
    out: Path = Path("reproduced")
    importing: ImportOptions = field(default_factory=ImportOptions)
    rows: tuple[str, ...] = ()
    limit: int | None = None
    submission: bool = True
    allow_missing: bool = False
    shared_concept: bool = False
    wording: str | None = None
    published: str | None = None
    against: Path | None = None
    provider: Provider = "auto"
    threads: int | None = None
    command: str = "dqe-reproduce"


class Talk(Protocol):
    """Who hears how it goes."""

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def stage(self, text: str) -> None:
        """What is being done, until the next."""
        ...

    def count(self, what: str, done: int, total: int) -> None:
        """A bar."""
        ...

    def interruptible(self) -> AbstractContextManager[Callable[[], None]]:
        """Hold Ctrl-C back until the yielded function is called."""
        ...


@dataclass(frozen=True)
class Checked:
    """Inputs in order: nothing was written, and no weight read."""

    source: Source
    work: Work
    wording: Wording
    rows: tuple[str, ...]
    row: Published | None
    earlier: Earlier | None
    needed: dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """`written`: files for the users, the table first."""

    results: Results
    table: str
    folder: Path
    written: tuple[Path, ...]


def check(wish: Wish, talk: Talk) -> Checked:
    """Hold all inputs against what the run needs. Raises DQEError, one line, for the first that does not do."""
    if wish.shared_concept and wish.dataset != "circo":
        raise InputError("--shared-concept is CIRCO's; leave it out")
    talk.stage("reading annotations")
    benchmark = find_annotations(wish.dataset, wish.annotations, wish.images)
    talk.stage("reading weights")
    source = open_source(wish.weights, wish.importing)
    wording = WORDINGS[wish.wording] if wish.wording else wording_of(source.layout)
    talk.stage("looking for images")
    work = plan_work(
        benchmark, wish.images, shared_concept=wish.shared_concept, wording=wording, submission=wish.submission, limit=wish.limit,
        allow_missing=wish.allow_missing,
    )  # fmt: skip
    rows = wish.rows or source.rows
    if strange := [row for row in rows if row not in source.rows]:
        raise InputError(f"--rows {strange[0]}: {wish.weights} has {', '.join(source.rows)}")
    row = published_row(wish.dataset, wish.published, source.layout, source.tower)
    earlier = None if wish.against is None else Earlier(wish.against, wish.dataset)
    if earlier is not None:
        earlier.check_asks({asked_of(one) for one in work.seen})
    judged = {one.view.split: sum(map(len, one.sets)) for one in work.seen}
    talk.say(f"{wish.dataset}: {benchmark.directory}; " + ", ".join(f"{n} queries of {split}" for split, n in judged.items())
             + f"; {len(work.ids)} images, {len(work.pairs)} pairs of reference and text to encode")  # fmt: skip
    told = f" of layout {source.layout}, tower ViT-{source.tower}" if source.layout else ""
    what = "a published file" if source.kind == "published" else f"a {source.kind}"
    talk.say(f"{wish.weights}: {what}{told}; rows {', '.join(rows)}; published row: {row.cited if row else 'none of this layout'}")
    return Checked(source, work, wording, tuple(row for row in source.rows if row in rows), row, earlier, needed_bytes(source, work, rows))


def reproduce(wish: Wish, talk: Talk) -> Outcome:
    """The table of `wish`, and everything that it is made of, under `wish.out`. Raises DQEError."""
    checked = check(wish, talk)
    source, work = checked.source, checked.work
    digests = work.digest(lambda done, total: talk.count("reading images", done, total))
    key = source_key(source, wish.importing, talk.stage)
    places = Places(wish.out, source, key, work, key_of(digests), wish.provider)
    talk.say(check_disk(wish.out, checked.needed, places.written(checked.rows)))
    make_model(places, wish.importing, talk.stage)
    notes, rows = list(work.notes), []
    for row in checked.rows:
        why = "" if row == "pytorch" or source.kind == "bundle" else make_bundle(places, row, talk.stage)
        notes += [why] if why else []
        rows += [] if why else [row]
    if not rows:
        raise ParityError(notes[-1])
    states = _encode(wish, talk, work, places, rows)
    asked = [asked_of(one) for one in work.seen]
    texts = _texts(checked.wording, work.dataset, shared_concept=wish.shared_concept)
    folder = places.results(asked, rows, wish.limit, texts, wish.published, str(wish.against), wish.submission)
    views, by_view, files = _judge(talk, work, places, states, texts, checked.earlier, folder)
    results = Results(
        dataset=work.dataset, weights=wish.weights.name, imported=provenance(places.model if "pytorch" in rows else places.bundle(rows[0])),
        texts=texts, command=wish.command, date=date.today().isoformat(), versions=_versions(),
        measures={measure.name: measure.title for measure in measures_of(work.dataset)}, views=tuple(views),
        published=_published(work.dataset, checked.row), notes=(*notes, *_notes(work, checked, shared_concept=wish.shared_concept)),
    )  # fmt: skip
    table = markdown(results)
    write_results(folder, results, by_view, table)
    return Outcome(results, table, folder, (folder / TABLE, folder / RESULTS, *files))


def _encode(wish: Wish, talk: Talk, work: Work, places: Places, rows: Sequence[str]) -> dict[str, State]:
    """Everything encoded, by row. The first block of each row comes first, so that the time of all is known before most of it is spent."""

    def run(row: str, blocks: int | None, between: Callable[[], None]) -> State:
        return encode(
            places.encoded(row), work, lambda: open_row(places, row, wish.provider, wish.threads), blocks=blocks, between=between,
            progress=lambda state: talk.count(f"encoding, {ROWS[row]}", state.images, len(work.ids)),
        )  # fmt: skip

    with talk.interruptible() as between:
        talk.stage("encoding the first images")
        states = {row: read_state(places.encoded(row)) for row in rows}
        states = {row: state if state.images else run(row, 1, between) for row, state in states.items()}
        left = {row: (len(work.ids) - state.images) * state.per_image for row, state in states.items() if state.images < len(work.ids)}
        if left:
            told = ", ".join(f"{ROWS[row]} {spell_seconds(seconds)}" for row, seconds in left.items())
            total = spell_seconds(sum(left.values()))
            talk.say(f"encoding takes about {total} ({told}), by the images so far; after Ctrl-C the same command goes on where it stopped")
        return {row: run(row, None, between) if row in left else state for row, state in states.items()}


def _judge(
    talk: Talk, work: Work, places: Places, states: dict[str, State], texts: str, earlier: Earlier | None, folder: Path
) -> tuple[list[ViewResult], dict[tuple[str, str], Rows], list[Path]]:
    """Views with their rows and differences, the rows behind the figures, and the files for servers and readers."""
    rankings: dict[str, list[list[NDArray[np.int64]]]] = {}
    files: list[Path] = []
    for row in states:
        talk.stage(f"ranking, {ROWS[row]}")
        encoded = open_encoded(places.encoded(row), work)
        with _ranker(row, work, places, encoded) as rank:
            rankings[row] = [[rank(q, gallery) for q, gallery in zip(one.sets, one.galleries, strict=True)] for one in work.seen]
        for one, ranked in zip(work.seen, rankings[row], strict=True):
            if not one.view.judged:
                (queries,), (only,) = one.sets, ranked
                made = submission(work.dataset, one.view.split, queries, only)
                files += write_submission(folder / "submission" / row, made)
            path = folder / "answers" / row / f"{_slug(one)}.jsonl"
            write_answers(path, one.sets, ranked)
    by_view: dict[tuple[str, str], Rows] = {}
    views = []
    for at, one in enumerate(work.seen):
        talk.stage(f"figures, {one.view.name}")
        views.append(_view(work, one, {row: found[at] for row, found in rankings.items()}, states, texts, earlier, by_view))
    return views, by_view, files


def _view(
    work: Work, one: Seen, rankings: dict[str, list[NDArray[np.int64]]], states: dict[str, State], texts: str, earlier: Earlier | None,
    by_view: dict[tuple[str, str], Rows],
) -> ViewResult:  # fmt: skip
    measures, asked = measures_of(work.dataset), asked_of(one)
    made: dict[str, RowResult] = {}
    first = next(iter(rankings.values()))
    for row, ranked in rankings.items():
        figures, aspects = {}, {}
        if one.view.judged:
            by_set = {q.name: ranking_figures(work.dataset, q, found) for q, found in zip(one.sets, ranked, strict=True)}
            by_view[asked, row] = rows_of(measures, by_set)
            figures = summarise(measures, by_view[asked, row])
            aspects = aspect_figures(one.sets[0], ranked[0]) if len(one.sets) == 1 else {}
        same = np.concatenate([(a[:, :10] == b[:, :10]).all(axis=1) for a, b in zip(ranked, first, strict=True)]).mean()
        made[row] = RowResult(
            label=ROWS[row], device=states[row].device, figures=figures, same_first_10=None if ranked is first else float(same),
            aspects=aspects,
        )  # fmt: skip
    differences = []
    for row, label, other in _pairs(list(rankings), asked, texts, earlier, by_view) if one.view.judged else ():
        figures = summarise(measures, difference(by_view[asked, row], other))
        differences.append(Paired(of=ROWS[row], against=label, figures=figures))
    return ViewResult(
        view=one.view, queries={q.name: len(q) for q in one.sets}, gallery={q.name: len(q.gallery) for q in one.sets}, asked=asked,
        rows=made, differences=tuple(differences),
    )  # fmt: skip


def _pairs(
    rows: Sequence[str], asked: str, texts: str, earlier: Earlier | None, by_view: dict[tuple[str, str], Rows]
) -> Iterator[tuple[str, str, Rows]]:
    """Each row against the one before it, and against the same row of an earlier run, where that asked the same."""
    for before, row in pairwise(rows):
        yield row, ROWS[before], by_view[asked, before]
    if earlier is None:
        return
    told = "" if earlier.results.texts == texts else f" (texts {earlier.results.texts})"
    for row in rows:
        if (other := earlier.rows(asked, row)) is not None:
            yield row, f"{earlier.results.weights}, {ROWS[row]}{told}", other


@contextmanager
def _ranker(row: str, work: Work, places: Places, encoded: Encoded) -> Iterator[Rank]:
    if row == "pytorch":
        yield rank_arrays(work, encoded)
        return
    members = {name: queries.gallery for one in work.seen for queries, name in zip(one.sets, one.galleries, strict=True)}
    path, bundle = places.index(row, sorted(members.items())), Bundle.load(places.bundle(row), verify=False)
    write_index(path, bundle, work, encoded, members)
    with GalleryIndex.load(path, model_hash=bundle.model_hash) as index:
        yield rank_index(work, encoded, index)


def _texts(wording: Wording, dataset: str, *, shared_concept: bool) -> str:
    """How the texts were read, for the results."""
    concept = "with the shared concept" if shared_concept else ""
    return "; ".join(filter(None, (concept, wording.describe(dataset)))) or "as annotated"


def _slug(one: Seen) -> str:
    kept = "kept" if one.view.reference_kept else "left-out"
    return "-".join(filter(None, (one.view.split, one.view.gallery, f"reference-{kept}")))


def _published(dataset: str, row: Published | None) -> PublishedRow | None:
    if row is None:
        return None
    return PublishedRow(
        name=row.name, title=row.cited, source=f"[{row.source}] {SOURCES[row.source]}", of=SPLITS[dataset], figures=row.figures
    )


def _notes(work: Work, checked: Checked, *, shared_concept: bool) -> Iterator[str]:
    wording, dataset = checked.wording, work.dataset
    if shared_concept:
        yield "texts begin with the shared concept, which no model's public code reads"
    if told := wording.describe(dataset):
        yield f"texts as {wording.name}'s public code makes them: {told}; --wording plain reads the dataset's own"
    if dataset in wording.unknown:
        yield f"{wording.name}'s public code does not evaluate on {dataset}: which text its published figures were made with is not known"
    if checked.row is not None and checked.source.layout is not None:
        yield "a file's layout does not say what it was trained on: the published row is of weights trained for it"
    if dataset != "fashioniq" and checked.row is not None:
        yield "the published row is of the test split, which its server judges; the figures here are of val"
    if any(not one.view.judged for one in work.seen):
        yield "submission/ has the files for the test server"
    if dataset == "fashioniq":
        if (authors := wording_of(checked.source.layout)) is not PLAIN:  # read from their code, all three
            yield f"{authors.name}'s public code ranks the gallery `original` with the reference in it: compare its row with that view"
        yield "two galleries are in use, and papers often do not say which; those that say nothing keep the reference in it"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version(), "machine": platform.machine()}


def spell_seconds(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
