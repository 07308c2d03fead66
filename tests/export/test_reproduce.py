"""dqe-reproduce: its figures are those of the other path, an interrupted run ends in the same table, and what is wrong is said first."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import published_models as files
from support.tiny_benchmarks import write_circo, write_cirr, write_fashioniq
from support.tiny_training import one_cpu_thread

from dqe_engine.errors import ParityError
from dqe_engine.zones.reference import max_sim
from dqe_export.cli import reproduce as cli
from dqe_export.reproduce import Wish, reproduce
from dqe_export.reproduce.encoding import STATE, TARGETS, encode, open_encoded, read_state
from dqe_export.reproduce.results import Earlier
from dqe_export.reproduce.run import Outcome
from dqe_export.reproduce.work import find_annotations, plan_work
from dqe_training.cli import evaluate
from dqe_training.cli.data import main as data_main
from dqe_training.data.public.base import Options
from dqe_training.data.public.wording import WORDINGS
from dqe_training.data.queries import QuerySet
from dqe_training.evaluation.benchmarks import evaluate_benchmark, fashioniq_figures, summary
from dqe_training.evaluation.protocol import Embeddings
from dqe_training.evaluation.rankers import open_ranker
from dqe_training.importing import ImportOptions

SIZE = replace(files.TINY["clip"], depth=1, layers=1, queries=2)


class Heard:
    """Hears everything, and presses Ctrl-C where `stop` says so."""

    def __init__(self, stop: Callable[[str], bool] = lambda what: False) -> None:
        self.lines: list[str] = []
        self._stop = stop

    def say(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, text: str) -> None:
        if self._stop(text):
            raise KeyboardInterrupt

    def count(self, what: str, done: int, total: int) -> None:
        self.stage(f"{what} {done}")

    @contextmanager
    def interruptible(self) -> Iterator[Callable[[], None]]:
        yield lambda: None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("reproduce")
    for seed, name in enumerate(("one.pth", "other.pth")):
        files.save("qure", root / name, SIZE, seed=seed)
    files.write_vocabulary(root / "vocab.txt", SIZE.words)
    write_fashioniq(root / "fashioniq")
    write_cirr(root / "cirr")
    write_circo(root / "circo")
    with one_cpu_thread():
        yield root


def wish(place: Path, dataset: str, **options: object) -> Wish:
    importing = ImportOptions(tokenizer=str(place / "vocab.txt"), vision_heads=4, qformer_heads=2)
    made = Wish(dataset, place / "one.pth", place / dataset, out=place / "out", importing=importing)
    return replace(made, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fashioniq(place: Path) -> Outcome:
    return reproduce(wish(place, "fashioniq"), Heard())


@pytest.fixture(scope="module")
def cirr(place: Path, fashioniq: Outcome) -> Outcome:
    """After FashionIQ's, whose model and bundles it takes."""
    made = [path.stat().st_mtime_ns for path in sorted(place.glob("out/bundles/*/manifest.json"))]
    outcome = reproduce(wish(place, "cirr"), Heard())
    assert [path.stat().st_mtime_ns for path in sorted(place.glob("out/bundles/*/manifest.json"))] == made
    assert len(made) == 2
    return outcome


def folder_of(place: Path, row: str) -> Path:
    (found,) = place.glob("out/models/one-*" if row == "pytorch" else f"out/bundles/one-{row}-*")
    return found


# -- figures -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["pytorch", "f32", "int8"])
@pytest.mark.parametrize("gallery", ["original", "val"])
def test_fashioniqs_figures_are_those_of_the_other_path(place: Path, fashioniq: Outcome, row: str, gallery: str) -> None:
    """dqe-eval's evaluation, for the reference kept; rankings written down plainly, for the reference left out."""
    benchmark = find_annotations("fashioniq", None, place / "fashioniq")
    ranker, seen = open_ranker(folder_of(place, row)), {}

    def remembering(queries: QuerySet, folder: Path, names: list[str]) -> Embeddings:
        seen[queries.name] = (queries, ranker(queries, folder, names))
        return seen[queries.name][1]

    report, _ = evaluate_benchmark(benchmark, remembering, split="val", options=Options(gallery=gallery))  # type: ignore[arg-type]
    kept, left_out = (view for view in fashioniq.results.views if view.view.gallery == gallery)
    assert (kept.view.reference_kept, left_out.view.reference_kept) == (True, False)
    figures = {name: figure.value for name, figure in kept.rows[row].figures.items()}
    expected = {f"{part.name}/{name}": value for part in report.sets for name, value in part.figures.items()}
    assert figures == pytest.approx(expected | {"mean": report.summary["mean"]}, abs=1e-12)

    by_set = []
    for queries, found in seen.values():
        scores = max_sim(found.queries, found.target_tokens).astype(np.float64)
        scores[np.arange(len(queries)), queries.reference] = -np.inf
        ranked = np.argsort(-scores, axis=1, kind="stable")[:, : len(queries.gallery) - 1]
        by_set.append({name: figure.value for name, figure in fashioniq_figures(queries, ranked).items()})
    assert left_out.rows[row].figures["mean"].value == pytest.approx(summary("fashioniq", by_set)["mean"], abs=1e-12)


def test_leaving_the_reference_out_changes_figures(fashioniq: Outcome) -> None:
    kept, left_out = fashioniq.results.views[:2]
    better = [left_out.rows["f32"].figures[name].value - figure.value for name, figure in kept.rows["f32"].figures.items()]
    assert min(better) >= 0
    assert max(better) > 0


def test_the_runtimes_float32_rows_are_pytorchs(fashioniq: Outcome, cirr: Outcome) -> None:
    for view in (*fashioniq.results.views, *cirr.results.views):
        assert view.rows["f32"].figures == view.rows["pytorch"].figures
        assert view.rows["f32"].same_first_10 == 1
        assert view.rows["pytorch"].same_first_10 is None


def test_cirrs_figures_and_files_are_those_of_the_other_path(place: Path, cirr: Outcome, tmp_path: Path) -> None:
    val, test = cirr.results.views
    bundle = str(folder_of(place, "f32"))
    benchmark = find_annotations("cirr", None, place / "cirr")
    report, _ = evaluate_benchmark(benchmark, open_ranker(Path(bundle)), split="val")
    figures = {name: figure.value for name, figure in val.rows["f32"].figures.items()}
    assert figures == pytest.approx(report.sets[0].figures | report.summary, abs=1e-12)
    assert (test.view.judged, test.rows["f32"].figures) == (False, {})
    assert evaluate.main([bundle, "--data", str(place / "cirr"), "--split", "test1", "--submission", str(tmp_path)]) == 0
    for theirs in sorted(tmp_path.iterdir()):
        for row in ("pytorch", "f32"):
            assert (cirr.folder / "submission" / row / theirs.name).read_bytes() == theirs.read_bytes()
        assert data_main(["check-submission", str(cirr.folder / "submission" / "int8" / theirs.name), "--data", str(place / "cirr")]) == 0


def test_circos_figures_and_file(place: Path) -> None:
    outcome = reproduce(wish(place, "circo", images=place / "circo" / "COCO2017_unlabeled", rows=("pytorch",)), Heard())
    benchmark = find_annotations("circo", place / "circo", place / "circo")
    options = Options(wording=WORDINGS["qure"])
    report, _ = evaluate_benchmark(benchmark, open_ranker(folder_of(place, "pytorch")), split="val", options=options)
    row = outcome.results.views[0].rows["pytorch"]
    expected = {name: value for name, value in report.sets[0].figures.items() if name.startswith("map_at")}
    assert {name: figure.value for name, figure in row.figures.items()} == pytest.approx(expected, abs=1e-12)
    assert row.aspects == report.sets[0].aspects
    (file,) = outcome.folder.glob("submission/pytorch/*")
    assert {len(ids) for ids in json.loads(file.read_text()).values()} == {50}
    assert data_main(["check-submission", str(file), "--data", str(place / "circo")]) == 0
    assert outcome.results.texts == 'the caption is read as "a photo of $ that {}"'
    assert "texts as qure's public code makes them" in outcome.table
    lines = [json.loads(line) for line in (outcome.folder / "answers" / "pytorch" / "val-reference-kept.jsonl").read_text().splitlines()]
    assert all(line["text"].startswith("a photo of $ that ") for line in lines)

    asked = wish(place, "circo", images=place / "circo" / "COCO2017_unlabeled", rows=("pytorch",), wording="plain", against=outcome.folder)
    plain = reproduce(asked, Heard())  # the same questions in other words: paired, and said
    (pair,) = plain.results.views[0].differences
    assert pair.against == 'one.pth, PyTorch float32 (texts the caption is read as "a photo of $ that {}")'
    assert plain.results.texts == "as annotated"
    assert plain.folder != outcome.folder
    report, _ = evaluate_benchmark(benchmark, open_ranker(folder_of(place, "pytorch")), split="val")
    for k in (5, 10, 25, 50):
        assert plain.results.views[0].rows["pytorch"].figures[f"map_at_{k}"].value == pytest.approx(report.sets[0].figures[f"map_at_{k}"])


def test_the_published_row_stands_beside(fashioniq: Outcome) -> None:
    lines = fashioniq.table.splitlines()
    head = lines.index("| method | dress | shirt | toptee | mean |")
    assert lines[head + 2].endswith("| 46.80 / 69.81 | 53.53 / 72.87 | 57.47 / 77.77 | 63.04 |")
    assert lines[head + 2].startswith("| QuRe, ViT-L [3], published")
    assert sum(line.startswith("| one.pth, ") for line in lines) == 12  # two galleries, reference kept and left out, three rows
    assert "qure's public code ranks the gallery `original` with the reference in it" in fashioniq.table
    assert fashioniq.results.published is not None
    assert fashioniq.results.published.name == "qure-vitl"


# -- interrupted ---------------------------------------------------------------------------------------------------------------


def test_interrupted_anywhere_it_ends_in_the_same_table(place: Path, cirr: Outcome) -> None:
    """Between stages and inside them, each time by the next moment; what was done is not done again."""
    moments = iter(("hashing", "writing ", "f32: checking", "int8: ", "encoding, PyTorch float32 64", "encoding, runtime float32 32",
                    "encoding, runtime int8 96", "ranking, runtime float32", "figures"))  # fmt: skip
    asked = wish(place, "cirr", out=place / "interrupted")
    heard: list[str] = []
    for moment in moments:

        def stop(what: str, moment: str = moment) -> bool:
            heard.append(what)
            return what.startswith(moment)

        with pytest.raises(KeyboardInterrupt):
            reproduce(asked, Heard(stop))
        assert heard[-1].startswith(moment)
    heard.clear()
    outcome = reproduce(asked, Heard(lambda what: bool(heard.append(what))))
    assert not [what for what in heard if what.startswith(("writing", "f32:", "int8:", "encoding, "))]
    assert outcome.table == cirr.table
    assert outcome.results == cirr.results
    for row in ("pytorch", "f32", "int8"):
        for path in (cirr.folder / "submission" / row).iterdir():
            assert (outcome.folder / "submission" / row / path.name).read_bytes() == path.read_bytes()


def test_a_kill_between_the_files_of_a_block_loses_that_block(place: Path, tmp_path: Path) -> None:
    """Values that are on the disk before the state says so are written again, not twice."""
    work = plan_work(find_annotations("cirr", None, place / "cirr"), place / "cirr")
    calls = []

    def rank(queries: QuerySet, folder: Path, names: list[str]) -> Embeddings:
        calls.append(len(names))
        at = np.asarray([work.ids.index(id) for id in queries.gallery], np.float32)
        asked = np.asarray([int(query.id) for query in queries.queries], np.float32)
        targets = np.repeat(at, 6).reshape(-1, 2, 3)
        return Embeddings(np.repeat(asked, 3).reshape(-1, 3), targets, asked, asked, asked)  # type: ignore[arg-type]

    encode(tmp_path, work, lambda: (rank, "cpu"), blocks=2)  # type: ignore[arg-type]
    before = read_state(tmp_path)
    assert (before.images, before.device) == (64, "cpu")
    for name in ("targets.f32", "queries.f32"):
        with open(tmp_path / name, "ab") as stream:
            stream.write(b"killed here")
    encode(tmp_path, work, lambda: (rank, "cpu"))  # type: ignore[arg-type]
    assert calls == [32, 32, 32, 24]
    encoded = open_encoded(tmp_path, work)
    assert encoded.targets[:, 1, 2].tolist() == list(range(len(work.ids)))
    assert encoded.queries[:, 0].tolist() == list(range(len(work.pairs)))
    (tmp_path / TARGETS).write_bytes(b"short")
    with pytest.raises(ValueError, match="5 bytes, expected at least"):
        encode(tmp_path, work, lambda: (rank, "cpu"))  # type: ignore[arg-type]
    assert STATE in {path.name for path in tmp_path.iterdir()}


# -- other weights, a trial, a bundle ------------------------------------------------------------------------------------------


def test_other_weights_are_compared_query_by_query(place: Path, cirr: Outcome) -> None:
    outcome = reproduce(wish(place, "cirr", weights=place / "other.pth", rows=("pytorch",), against=cirr.folder), Heard())
    val, first = outcome.results.views[0], cirr.results.views[0]
    (pair,) = val.differences
    assert pair.against == "one.pth, PyTorch float32"
    for name, figure in pair.figures.items():
        expected = val.rows["pytorch"].figures[name].value - first.rows["pytorch"].figures[name].value
        assert figure.value == pytest.approx(expected, abs=1e-12)
        assert figure.interval[0] - 1e-9 <= figure.value <= figure.interval[1] + 1e-9
    assert any(figure.interval[0] < figure.interval[1] for figure in pair.figures.values())
    assert Earlier(outcome.folder, "cirr").rows(val.asked, "pytorch") is not None


def test_a_trial_says_that_it_is_one(place: Path, cirr: Outcome) -> None:
    outcome = reproduce(wish(place, "cirr", limit=3, rows=("pytorch",)), Heard())
    assert [(view.view.split, view.queries) for view in outcome.results.views] == [("val", {"val": 3})]
    assert "shows that everything runs, and no more" in outcome.table
    assert not (outcome.folder / "submission").exists()
    assert outcome.folder != cirr.folder


def test_a_bundle_has_its_own_row(place: Path, cirr: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(place / "of-bundle")
    arguments = ["cirr", "--weights", str(folder_of(place, "f32")), "--images", str(place / "cirr"), "--out", out, "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["views"][0]["rows"]) == ["f32"]
    figures = cirr.results.views[0].rows["f32"].figures
    assert {name: figure["value"] for name, figure in found["views"][0]["rows"]["f32"]["figures"].items()} == {
        name: figure.value for name, figure in figures.items()
    }
    assert not (place / "of-bundle" / "bundles").exists()


def test_answers_say_what_came_first(place: Path, cirr: Outcome) -> None:
    lines = [json.loads(line) for line in (cirr.folder / "answers" / "f32" / "val-reference-left-out.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert all(len(line["first"]) == 10 and line["reference"] not in line["first"] for line in lines)
    placed = np.mean([line["place"] is not None and line["place"] <= 5 for line in lines])
    assert placed == pytest.approx(cirr.results.views[0].rows["f32"].figures["recall_at_5"].value)


# -- what is wrong is said first -----------------------------------------------------------------------------------------------


def test_check_says_what_would_be_done_and_writes_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main([*command(place), "--check", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "20 queries of val, 10 queries of test1; 120 images" in said
    assert "layout qure, tower ViT-L" in said
    assert "disk: up to" in said
    assert not out.exists()


def command(place: Path, dataset: str = "cirr") -> list[str]:
    return [dataset, "--weights", str(place / "one.pth"), "--images", str(place / "cirr"), "--tokenizer", str(place / "vocab.txt"),
            "--vision-heads", "4", "--qformer-heads", "2"]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--images", "GONE"], r"3 of 120 images of cirr are missing, for example dev-0-0-img0; dqe-data check .*lists them"),
        (["--images", "NOWHERE"], "no annotations of cirr here or one folder above"),
        (["--annotations", "fashioniq"], "no annotations of cirr here"),
        (["--weights", "none.pt"], r"none\.pt: no such file"),
        (["--weights", "vocab.txt"], "vocab.txt"),
        (["--published", "best"], "--published best: no such row of cirr; choose clip4cir, sprc-vitl"),
        (["--against", "cirr"], "no results.json with its rows.npz here"),
        (["--shared-concept"], "--shared-concept is CIRCO's"),
        (["--out", "vocab.txt"], "is no folder"),
        (["--weights", "DAMAGED"], "images cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(
    place: Path, tmp_path: Path, change: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    arguments = [*command(place), "--annotations", str(place / "cirr"), "--out", str(tmp_path / "out")]
    if change[1:] == ["GONE"]:
        write_cirr(tmp_path / "cirr")
        for n in range(3):
            next((tmp_path / "cirr" / "dev").glob(f"dev-{n // 2}-{n % 2}-img0.png")).unlink()
        change = ["--images", str(tmp_path / "cirr")]
    elif change[1:] == ["NOWHERE"]:
        (tmp_path / "a" / "b").mkdir(parents=True)
        arguments, change = command(place), ["--images", str(tmp_path / "a" / "b")]
    elif change[1:] == ["DAMAGED"]:
        shutil.copytree(place / "cirr", tmp_path / "cirr")
        next((tmp_path / "cirr" / "dev").iterdir()).write_bytes(b"<html>")
        change = ["--images", str(tmp_path / "cirr")]
    assert cli.main([*arguments, *change]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(said, errors[0])
    assert not (tmp_path / "out").exists()


def test_no_row_at_all_is_an_error(place: Path, cirr: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqe_export.reproduce.run.make_bundle", lambda *made: "no row of int8: too far from PyTorch")
    with pytest.raises(ParityError, match="no row of int8"):
        reproduce(wish(place, "cirr", rows=("int8",)), Heard())


def test_missing_images_can_be_left_out_and_are_counted(place: Path, tmp_path: Path) -> None:
    write_cirr(tmp_path / "cirr")
    (tmp_path / "cirr" / "dev" / "dev-0-0-img0.png").unlink()
    asked = wish(place, "cirr", images=tmp_path / "cirr", allow_missing=True, rows=("pytorch",))
    outcome = reproduce(asked, Heard())
    assert [view.view.split for view in outcome.results.views] == ["val"]  # a server takes whole answers alone
    assert any("1 of 60 images" in note and "not comparable" in note for note in outcome.results.notes)
