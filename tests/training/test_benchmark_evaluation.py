"""The public datasets from folder to figures, with a tiny model: against brute force, with images missing, and in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_benchmarks import WRITERS, write_cirr, write_fashioniq
from support.tiny_bundle import build_tiny_bundle
from support.tiny_training import OVERRIDES, write_checkpoint

from dqe_engine.errors import InputError
from dqe_engine.preprocessing import preprocess
from dqe_training.checkpointing.checkpoint import Checkpoint, load_checkpoint
from dqe_training.cli import data, evaluate, train
from dqe_training.data.public.base import Benchmark, Options
from dqe_training.data.public.detect import open_benchmark
from dqe_training.data.public.placing import open_images
from dqe_training.data.queries import QuerySet
from dqe_training.evaluation.benchmarks import evaluate_benchmark
from dqe_training.evaluation.rankers import CheckpointRanker
from dqe_training.features import blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    for name, write in WRITERS.items():
        write(root / name)
    return root


def opened(folders: Path, name: str) -> Benchmark:
    benchmark = open_benchmark(folders / name)
    assert benchmark is not None
    return benchmark


def brute_force(checkpoint: Checkpoint, benchmark: Benchmark, queries: QuerySet) -> list[list[str]]:
    """Every query's whole ranking, one image and one query at a time; the reference left out where the protocol says so."""
    folder, model = open_images(benchmark, None), checkpoint.model
    with torch.inference_mode():
        paths = [folder.root / folder.names[id] for id in queries.gallery]
        tokens = [model.encode_images(torch.from_numpy(preprocess([path], model.config.preprocessing))) for path in paths]
        targets = np.concatenate([model.encode_targets(t).numpy() for t in tokens])
        rankings = []
        for query in queries.queries:
            ids = torch.tensor([checkpoint.tokenizer.encode(query.text if query.text.strip() else ".").ids])
            output = model.encode_query(tokens[queries.gallery.index(query.reference)], ids, torch.ones_like(ids))
            scores = (targets @ output.query[0].numpy()).max(axis=1)
            order = np.argsort(-scores, kind="stable").tolist()
            rankings.append([queries.gallery[at] for at in order if queries.gallery[at] not in query.exclude])
    return rankings


def hit_share(rankings: Sequence[Sequence[str]], queries: QuerySet, k: int) -> float:
    return float(np.mean([q.targets[0] in ranking[:k] for q, ranking in zip(queries.queries, rankings, strict=True)]))


@pytest.mark.parametrize("gallery", ["original", "val"])
def test_fashioniq(model: Path, folders: Path, gallery: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark, checkpoint = opened(folders, "fashioniq"), load_checkpoint(model)
    arguments = [str(model), "--data", str(folders / "fashioniq"), "--gallery", gallery]
    assert evaluate.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dataset"], report["split"], report["protocol"]) == ("fashioniq", "val", f"gallery {gallery}, reference kept")
    for part, queries in zip(report["sets"], benchmark.query_sets("val", Options(gallery=gallery), None), strict=True):
        rankings = brute_force(checkpoint, benchmark, queries)
        assert part["name"] == queries.name
        assert part["coverage"]["images"] == len(queries.gallery)
        assert part["figures"] == pytest.approx({f"recall_at_{k}": hit_share(rankings, queries, k) for k in (10, 50)})
    means = [np.mean([part["figures"][f"recall_at_{k}"] for part in report["sets"]]) for k in (10, 50)]
    assert report["summary"] == pytest.approx({"recall_at_10": means[0], "recall_at_50": means[1], "mean": np.mean(means)})
    assert evaluate.main(arguments) == 0
    assert f"{report['summary']['mean']:.4f}" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("name", ["cirr", "pinpoint"])
def test_a_wording_that_a_dataset_does_not_have_is_refused(
    name: str, model: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(model), "--data", str(folders / name), "--dataset", name, "--wording", "qure"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"--wording qure: every model reads a caption of {name} as it is; leave it out" in told


def test_cirr_and_its_submission(model: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark, checkpoint = opened(folders, "cirr"), load_checkpoint(model)
    arguments = [str(model), "--data", str(folders / "cirr"), "--dataset", "cirr", "--json"]
    assert evaluate.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    (queries,) = benchmark.query_sets("val", Options(), None)
    rankings = brute_force(checkpoint, benchmark, queries)
    within = [[id for id in ranking if id in query.subset] for ranking, query in zip(rankings, queries.queries, strict=True)]
    expected = {f"recall_at_{k}": hit_share(rankings, queries, k) for k in (1, 5, 10, 50)}
    expected |= {f"subset_recall_at_{k}": hit_share(within, queries, k) for k in (1, 2, 3)}
    assert report["sets"][0]["figures"] == pytest.approx(expected)
    assert list(report["summary"].values()) == pytest.approx([(expected["recall_at_5"] + expected["subset_recall_at_1"]) / 2])

    out = tmp_path / "out"
    test1 = [*arguments[:-1], "--split", "test1", "--submission", str(out)]
    assert evaluate.main(test1) == 0
    printed = capsys.readouterr().out
    assert "10 queries, 1 without words over 60 images" in printed
    (queries,) = benchmark.query_sets("test1", Options(), None)
    rankings = brute_force(checkpoint, benchmark, queries)
    for metric, length in (("recall", 50), ("recall_subset", 3)):
        path = out / f"cirr-test1-{metric}.json"
        assert str(path) in printed
        content = json.loads(path.read_text())
        for query, ranking in zip(queries.queries, rankings, strict=True):
            wanted = ranking if metric == "recall" else [id for id in ranking if id in query.subset]
            assert content[query.id] == wanted[:length]
        assert data.main(["check-submission", str(path), "--data", str(folders / "cirr")]) == 0
        capsys.readouterr()
    assert evaluate.main(test1) == 2
    assert "cirr-test1-recall.json: exists already" in capsys.readouterr().err
    assert evaluate.main([*test1, "--force"]) == 0


def test_circo_and_its_submission(model: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark, checkpoint = opened(folders, "circo"), load_checkpoint(model)
    arguments = [str(model), "--data", str(folders / "circo"), "--json"]
    reports = []
    for extra in ([], ["--shared-concept"]):
        assert evaluate.main([*arguments, *extra]) == 0
        reports.append(json.loads(capsys.readouterr().out))
        (queries,) = benchmark.query_sets("val", Options(shared_concept=bool(extra)), None)
        rankings = brute_force(checkpoint, benchmark, queries)
        for k in (5, 10, 25, 50):
            precisions = []
            for query, ranking in zip(queries.queries, rankings, strict=True):
                hits = [at for at, id in enumerate(ranking[:k], start=1) if id in query.targets]
                precisions.append(sum(number / at for number, at in enumerate(hits, start=1)) / min(len(query.targets), k))
            assert reports[-1]["sets"][0]["figures"][f"map_at_{k}"] == pytest.approx(np.mean(precisions))
            assert reports[-1]["sets"][0]["figures"][f"recall_at_{k}"] == pytest.approx(hit_share(rankings, queries, k))
        aspects = reports[-1]["sets"][0]["aspects"]
        assert [(name, aspect["queries"]) for name, aspect in aspects.items()] == [("addition", 14), ("negation", 5)]
        precisions = []
        for query, ranking in list(zip(queries.queries, rankings, strict=True))[::3]:  # those with a negation
            hits = [at for at, id in enumerate(ranking[:10], start=1) if id in query.targets]
            precisions.append(sum(number / at for number, at in enumerate(hits, start=1)) / min(len(query.targets), 10))
        assert aspects["negation"]["map_at_10"] == pytest.approx(np.mean(precisions))
        assert aspects["addition"]["map_at_10"] == pytest.approx(reports[-1]["sets"][0]["figures"]["map_at_10"])
        low, high = aspects["negation"]["interval"]
        assert low <= aspects["negation"]["map_at_10"] <= high
    assert evaluate.main(arguments[:-1]) == 0
    assert "map_at_10 by semantic aspect" in capsys.readouterr().out
    assert reports[0]["protocol"].startswith("text: relative caption;")
    assert reports[1]["protocol"].startswith("text: shared concept and relative caption;")
    assert evaluate.main([*arguments, "--split", "test", "--submission", str(tmp_path)]) == 0
    assert data.main(["check-submission", str(tmp_path / "circo-test.json"), "--data", str(folders / "circo")]) == 0


def test_hp_fashioniq(model: Path, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(model), "--data", str(folders / "hp-fashioniq"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    benchmark = opened(folders, "hp-fashioniq")
    (queries,) = benchmark.query_sets("all", Options(), None)
    rank = CheckpointRanker(load_checkpoint(model))
    folder = open_images(benchmark, None)
    found = rank(queries, folder.root, [folder.names[id] for id in queries.gallery])
    agreed, first = 0, []
    for row, query in enumerate(queries.queries):
        assert query.preference is not None
        scores = (found.target_tokens @ found.queries[row]).max(axis=1)
        means = [np.mean([scores[queries.position[id]] for id in side]) for side in (query.preference.first, query.preference.second)]
        agreed += (means[0] > means[1]) == (query.preference.preferred == 1)
        first += [query.preference.preferred == 1] if means[0] > means[1] else []
    assert 0 < agreed < 12
    assert report["sets"][0]["figures"] == pytest.approx({"preference_accuracy": agreed / 12, "preference_ratio": np.mean(first)})


@pytest.mark.parametrize("write", WRITERS.values())
def test_every_dataset_has_the_figure_that_it_is_compared_by(write: Callable[[Path], Path], model: Path, tmp_path: Path) -> None:
    benchmark = open_benchmark(write(tmp_path))
    assert benchmark is not None
    report, _ = evaluate_benchmark(benchmark, CheckpointRanker(load_checkpoint(model)), split=benchmark.splits[0])
    assert benchmark.headline in report.summary.keys() | report.sets[0].figures.keys()


def test_blocks_do_not_change_a_ranking(model: Path, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, checkpoint = opened(folders, "circo"), load_checkpoint(model)
    whole = evaluate_benchmark(benchmark, CheckpointRanker(checkpoint), split="val")
    monkeypatch.setattr(blocks, "_DECODED_AT_ONCE", 7)
    parts = evaluate_benchmark(benchmark, CheckpointRanker(checkpoint), split="val")
    assert whole[0] == parts[0]
    np.testing.assert_array_equal(whole[1][0].ranked, parts[1][0].ranked)


# -- missing images --------------------------------------------------------------------------------------------------------


def test_missing_images_are_an_error_or_counted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_fashioniq(tmp_path / "fashioniq")
    records = json.loads((folder / "captions" / "cap.dress.val.json").read_text())
    gone = records[0]["target"]
    (path,) = (folder / "images" / "dress").glob(f"{gone}.*")
    path.unlink()
    arguments = [str(model), "--data", str(folder), "--json"]
    assert evaluate.main(arguments) == 2
    assert f"1 of 20 images of dress are missing, for example {gone}; dqe-data check --missing-list" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--allow-missing"]) == 0
    captured = capsys.readouterr()
    dropped = sum(gone in (r["candidate"], r["target"]) for r in records)
    said = f"dress: dropped {dropped} of 8 queries ({100 * dropped / 8:.2f} %) and 1 of 20 images (5.00 %)"
    assert said in captured.err
    coverage = json.loads(captured.out)["sets"][0]["coverage"]
    assert (coverage["queries"], coverage["of_queries"], coverage["images"], coverage["of_images"]) == (8 - dropped, 8, 19, 20)
    for path in (folder / "images" / "dress").iterdir():
        path.unlink()
    assert evaluate.main([*arguments, "--allow-missing"]) == 2
    assert "dress: none of 8 queries has all its images" in capsys.readouterr().err


def test_nothing_is_encoded_before_every_image_is_found(model: Path, tmp_path: Path) -> None:
    folder = write_cirr(tmp_path / "cirr")
    (folder / "dev" / "dev-29-1-img0.png").unlink()

    def never(*_: object) -> None:
        raise AssertionError

    with pytest.raises(InputError, match="1 of 60 images of val are missing, for example dev-29-1-img0"):
        evaluate_benchmark(opened(tmp_path, "cirr"), never, split="val")  # type: ignore[arg-type]


# -- training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashioniq", "cirr"])
def test_training_on_a_public_dataset(name: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--config", "own-data", *OVERRIDES, "optim.epochs=1", "optim.batch_size=6"]
    assert train.main(["--data", str(folders / name), "--out", str(tmp_path / "run"), *small]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert evaluate.main([str(tmp_path / "run" / "model"), "--data", str(folders / name)]) == 0
    assert data.main(["encode", str(tmp_path / "run" / "model"), "--data", str(folders / name), "--out", str(tmp_path / "inputs")]) == 0
    assert np.load(tmp_path / "inputs" / "targets.npy").shape == ((36,) if name == "fashioniq" else (12,))


def test_training_without_the_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_cirr(tmp_path / "cirr")
    pairs = json.loads((folder / "captions" / "cap.rc2.train.json").read_text())
    gone = pairs[0]["reference"]
    next((folder / "train").glob(f"*/{gone}.png")).unlink()
    small = ["--config", "own-data", *OVERRIDES, "optim.epochs=1", "optim.batch_size=4"]
    arguments = ["--data", str(folder), "--out", str(tmp_path / "run"), *small]
    assert train.main(arguments) == 2
    assert f"images of cirr train are missing, for example {gone}" in capsys.readouterr().err
    assert train.main([*arguments, "--allow-missing"]) == 0
    dropped = sum(gone in (p["reference"], p["target_hard"]) for p in pairs)
    assert f"dropped {dropped} of 12 triplets" in capsys.readouterr().err


# -- mistakes --------------------------------------------------------------------------------------------------------------

Arguments = Callable[[Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda f: ["--data", f / "cirr", "--split", "test1"], "cirr test1: its targets are secret; write the server's files"),
        (lambda f: ["--data", f / "cirr", "--split", "train"], "no split 'train' to evaluate; there are val, test1"),
        (lambda f: ["--data", f / "cirr", "--gallery", "val"], "leave --gallery out"),
        (lambda f: ["--data", f / "cirr", "--submission", f / "x", "--allow-missing"], "leave out --allow-missing"),
        (lambda f: ["--data", f / "fashioniq", "--submission", f / "x"], "fashioniq has no test server"),
        (lambda f: ["--data", f / "cirr", "--dataset", "circo"], "no annotations of circo here"),
        (lambda f: ["--data", f / "cirr", "--images", f / "none"], "no such image folder"),
        (lambda f: ["--data", f, "--split", "test1"], "--split test1: a folder of JSON lines has val and test"),
    ],
)
def test_mistakes(model: Path, folders: Path, capsys: pytest.CaptureFixture[str], arguments: Arguments, said: str) -> None:
    assert evaluate.main([str(model), *map(str, arguments(folders))]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda f: ["--data", f / "circo"], "CIRCO has no training split"),
        (lambda f: ["--data", f / "cirr", "--config", "own-data", "--image-labels", f / "x"], "--image-labels goes with --triplets"),
        (lambda f: ["--triplets", f / "x", "--images", f, "--dataset", "cirr"], "--dataset and --allow-missing go with --data"),
        (lambda f: ["--data", f, "--allow-missing"], "leave out --images and --allow-missing"),
        (lambda f: ["--data", f / "cirr", "--triplets", f / "x", "--images", f], "give either --data DIR, or --triplets FILE"),
    ],
)
def test_training_mistakes(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Arguments, said: str) -> None:
    assert train.main([*map(str, arguments(folders)), "--out", str(tmp_path / "run"), *OVERRIDES]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_damaged_image_is_told_at_once_and_before_the_work(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all categories, for a checkpoint and a bundle alike: nobody wants to run an evaluation once per bad file."""
    write_fashioniq(tmp_path / "fashioniq")
    images = tmp_path / "fashioniq" / "images"
    for name, content in (("dress/Dva000.png", b""), ("shirt/Sva001.JPG", b"<html>404"), ("toptee/Tva002.webp", b"RIFF")):
        (images / name).write_bytes(content)
    for path in (model, build_tiny_bundle(tmp_path / "bundle")):
        assert evaluate.main([str(path), "--data", str(tmp_path / "fashioniq")]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        line = captured.err.splitlines()[-1]
        assert line.startswith(f"error: {images}: 3 of 60 images cannot be read: ")
        for said in (
            "dress/Dva000.png (empty)",
            "shirt/Sva001.JPG (a web page)",
            "toptee/Tva002.webp (not an image of an accepted format; ",
        ):
            assert said in line
