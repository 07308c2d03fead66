"""Files for the test servers: made in their formats, and refused for every rule that they break."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_benchmarks import write_circo, write_cirr, write_fashioniq

from dqe_engine.errors import InputError
from dqe_training.cli import data
from dqe_training.data.public.base import Options
from dqe_training.data.public.circo import CIRCO
from dqe_training.data.public.cirr import CIRR
from dqe_training.evaluation import submission as module
from dqe_training.evaluation.submission import check_file, open_for_submission, submission, write_submission

Change = Callable[[dict[str, Any]], object]


def rankings(queries: int, gallery: int, seed: int = 0) -> np.ndarray:
    return np.argsort(np.random.default_rng(seed).random((queries, gallery)), axis=1)


@pytest.fixture(scope="module")
def cirr(tmp_path_factory: pytest.TempPathFactory) -> CIRR:
    return CIRR(write_cirr(tmp_path_factory.mktemp("cirr"), images=False))


@pytest.fixture(scope="module")
def circo(tmp_path_factory: pytest.TempPathFactory) -> CIRCO:
    return CIRCO(write_circo(tmp_path_factory.mktemp("circo"), images=False))


def cirr_files(cirr: CIRR) -> module.Files:
    (queries,) = cirr.query_sets("test1", Options())
    ranked = rankings(len(queries), len(queries.gallery))
    left = np.asarray([[at for at in row if at != reference] for row, reference in zip(ranked, queries.reference, strict=True)])
    return submission("cirr", "test1", queries, left)


def circo_files(circo: CIRCO, split: str = "test") -> module.Files:
    (queries,) = circo.query_sets(split, Options())
    return submission("circo", split, queries, rankings(len(queries), len(queries.gallery))[:, :50])


def test_cirrs_two_files(cirr: CIRR, tmp_path: Path) -> None:
    (queries,) = cirr.query_sets("test1", Options())
    paths = write_submission(tmp_path / "out", cirr_files(cirr))
    assert [path.name for path in paths] == ["cirr-test1-recall.json", "cirr-test1-recall_subset.json"]
    ranked = rankings(len(queries), len(queries.gallery))
    for path, metric, length in zip(paths, ("recall", "recall_subset"), (50, 3), strict=True):
        content = json.loads(path.read_text())
        assert list(content) == ["version", "metric", *(query.id for query in queries.queries)]
        assert (content["version"], content["metric"]) == ("rc2", metric)
        for row, query in enumerate(queries.queries):
            allowed = set(query.subset) if metric == "recall_subset" else set(queries.gallery) - {query.reference}
            expected = [queries.gallery[at] for at in ranked[row] if queries.gallery[at] in allowed]
            assert content[query.id] == expected[:length]
        assert f"{metric}: 10 queries of {length} names: in order" in check_file(path, cirr)


def test_circos_file(circo: CIRCO, tmp_path: Path) -> None:
    for split, count in (("val", 14), ("test", 5)):
        (path,) = write_submission(tmp_path, circo_files(circo, split))
        content = json.loads(path.read_text())
        assert list(content) == [str(row) for row in range(count)]
        assert all(len(ids) == 50 and all(type(id) is int for id in ids) for ids in content.values())
        assert f"circo {split}, {count} queries of 50 ids: in order" in check_file(path, circo, split)


def lists(content: dict[str, Any]) -> list[str]:
    return [id for id in content if id not in ("version", "metric")]


CIRR_MISTAKES: list[tuple[str, Change, str]] = [
    ("recall", lambda c: c.pop("version"), "version None and metric 'recall', expected \"rc2\""),
    ("recall", lambda c: c.update(metric="mAP"), "metric 'mAP'"),
    ("recall", lambda c: c.update(metric=["recall"]), "metric ['recall']"),
    ("recall", lambda c: c.pop(lists(c)[0]), "9 lists for 10 queries; no list for query"),
    ("recall", lambda c: c.update({"7": c[lists(c)[0]]}), "11 lists for 10 queries; a list for '7', which is no query"),
    ("recall", lambda c: c[lists(c)[2]].pop(), "49 names, expected 50"),
    ("recall", lambda c: c[lists(c)[2]].__setitem__(7, c[lists(c)[2]][3]), "stands 2 times"),
    ("recall", lambda c: c[lists(c)[2]].__setitem__(7, "test1-x"), "test1-x is not in the gallery"),
    ("recall", lambda c: c[lists(c)[2]].__setitem__(7, 7), "expected a list of str"),
    ("recall", lambda c: c.update({lists(c)[1]: "names"}), "expected a list of str"),
    ("recall_subset", lambda c: c[lists(c)[2]].append(c[lists(c)[2]][0]), "4 names, expected 3"),
    ("recall_subset", lambda c: c[lists(c)[2]].__setitem__(0, "test1-25-1-img0"), "test1-25-1-img0 is not of its image set"),
]


@pytest.mark.parametrize(("metric", "change", "said"), CIRR_MISTAKES)
def test_what_cirrs_server_would_refuse(cirr: CIRR, tmp_path: Path, metric: str, change: Change, said: str) -> None:
    content = copy.deepcopy(cirr_files(cirr)[f"cirr-test1-{metric}.json"])
    change(content)
    refused(content, cirr, tmp_path, said)


@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
def test_a_reference_in_its_own_list(cirr: CIRR, tmp_path: Path, metric: str) -> None:
    (queries,) = cirr.query_sets("test1", Options())
    content = copy.deepcopy(cirr_files(cirr)[f"cirr-test1-{metric}.json"])
    content[queries.queries[3].id][0] = queries.queries[3].reference
    refused(content, cirr, tmp_path, f"query {queries.queries[3].id}: its reference {queries.queries[3].reference} is in its list")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("3"), "4 lists for 5 queries; no list for query 3"),
        (lambda c: c["3"].append(7), "51 names, expected 50"),
        (lambda c: c["3"].__setitem__(1, c["3"][0]), "stands 2 times"),
        (lambda c: c["3"].__setitem__(1, str(c["3"][1])), "expected a list of int"),
        (lambda c: c["3"].__setitem__(1, True), "expected a list of int"),
        (lambda c: c["3"].__setitem__(1, 12345), "12345 is not in the gallery"),
    ],
)
def test_what_circos_server_would_refuse(circo: CIRCO, tmp_path: Path, change: Change, said: str) -> None:
    content = circo_files(circo)["circo-test.json"]
    change(content)
    refused(content, circo, tmp_path, said)


def refused(content: dict[str, Any], benchmark: CIRR | CIRCO, tmp_path: Path, said: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        check_file(path, benchmark)
    assert str(caught.value).startswith(f"{path}")
    assert said in str(caught.value)


def test_files_that_are_no_submission(circo: CIRCO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.json"
    for raw, said in ((b'{"0": [1', "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "expected an object of lists, got list"),
                      (b'{"0": [], "0": []}', "the key '0' occurs twice")):  # fmt: skip
        path.write_bytes(raw)
        with pytest.raises(InputError, match=said):
            check_file(path, circo)
    with pytest.raises(InputError, match="no such file or directory; check the path"):
        check_file(tmp_path / "none.json", circo)
    path.write_text("{}")
    with pytest.raises(InputError, match="no queries of circo 'train' here; splits are val, test"):
        check_file(path, circo, "train")
    (written,) = write_submission(tmp_path, circo_files(circo))
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="bytes, the limit is 100"):
        check_file(written, circo)
    with pytest.raises(InputError, match=r"circo-test\.json: \d+ bytes"):
        circo_files(circo)


def test_rankings_that_are_too_short_are_not_written(cirr: CIRR) -> None:
    (queries,) = cirr.query_sets("test1", Options())
    with pytest.raises(InputError, match=r"cirr-test1-recall\.json, query \d+: 40 names, expected 50"):
        submission("cirr", "test1", queries, rankings(len(queries), 40))


def test_other_datasets_have_no_server(tmp_path: Path) -> None:
    write_fashioniq(tmp_path, images=False)
    with pytest.raises(InputError, match="submissions are for CIRR and CIRCO, here is fashioniq"):
        open_for_submission(tmp_path)
    with pytest.raises(InputError, match="here is neither"):
        open_for_submission(tmp_path / "captions")


def test_on_the_command_line(circo: CIRCO, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_submission(tmp_path, circo_files(circo))
    assert data.main(["check-submission", str(path), "--data", str(circo.directory)]) == 0
    assert capsys.readouterr().out == "circo test, 5 queries of 50 ids: in order\n"
    assert data.main(["check-submission", str(path), "--data", str(circo.directory), "--split", "val"]) == 2
    assert "5 lists for 14 queries" in capsys.readouterr().err
