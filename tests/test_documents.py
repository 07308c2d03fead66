"""Every versioned document says what it is, and one reader tells whoever took it for another."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import benchmarks
import dqe_engine
import dqe_export
import dqe_training
from benchmarks import report
from dqe_engine.contracts import versioned
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import InputError
from dqe_training.ablation.comparison import Comparison

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
OLD = {
    "gallery-index": {"schema_version": 1, "catalogue": {}, "targets": {}, "images": None, "rows": 1},
    "bundle": {"schema_version": 5, "graphs": [], "files": [], "vocabulary": {}, "zones": {}, "encoder_hash": ""},
    "attribute-heads": {"schema_version": 5, "encoder_hash": "", "files": [], "vocabulary": {}, "zones": {}},
    "tensorrt-engines": {"schema_version": 3, "engines": [], "device": {}},
    "mined-negatives": {"plan": {"kind": "mined-negatives", "schema_version": 1}, "files": []},
    "mining-run": {"plan": {"kind": "mined-negatives", "schema_version": 1}},
    "training-checkpoint": {"schema_version": 4, "config": {}, "progress": {}, "serving_zones": {}, "files": []},
    "image-features": {"schema_version": 1, "key": "", "image_tokens": 9, "width": 4, "vision": {}, "preprocessing": {}},
    "ablation-cell": {"schema_version": 2, "key": "", "refreshes": 1, "scores": {}, "config": {}},
    "ablation-results": {"schema_version": 2, "against": "baseline", "arms": [], "cells": {}},
    "benchmark-results": {"schema": 1, "benchmark": "zones", "sections": {}},
}
"""By kind: the keys that a document had before it said its kind, in part. Newer kinds have said it from the start."""


def documents() -> Iterator[type[Versioned]]:
    """All that the packages define."""
    for package in (dqe_engine, dqe_training, dqe_export, benchmarks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = Path(importlib.util.find_spec(module.name).origin or "")  # type: ignore[union-attr]
            if source.suffix == ".py" and "Versioned" in source.read_text():
                importlib.import_module(module.name)
    seen = [Versioned]
    for base in seen:
        seen += base.__subclasses__()
    yield from sorted(seen[1:], key=lambda document: document.__name__)


DOCUMENTS = {field.default: document for document in documents() for field in msgspec.structs.fields(document) if field.name == "kind"}


def test_every_kind_is_known_and_is_one_documents() -> None:
    assert len(DOCUMENTS) == len(list(documents()))
    assert set(DOCUMENTS) == set(versioned._NAMES)
    assert {kind for _, kind in versioned._WITHOUT_KIND} == set(OLD) <= set(DOCUMENTS)


@pytest.mark.parametrize("without_kind", [False, True])
@pytest.mark.parametrize("wanted", DOCUMENTS)
def test_a_document_of_another_kind_is_told_by_its_name(wanted: str, without_kind: bool, tmp_path: Path) -> None:
    for kind in (OLD if without_kind else DOCUMENTS).keys() - {wanted}:
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(OLD.get(kind, {}) | ({} if without_kind else {"kind": kind})))
        with pytest.raises(InputError) as caught:
            read_document(DOCUMENTS[wanted], path, remedy="make it again", error=InputError)
        assert str(caught.value) == f"{path}: this is {versioned._NAMES[kind]}, not {versioned._NAMES[wanted]}; check the path"


def test_what_is_none_of_ours_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ("[]", "{}", '{"name": "a web app"}', "1", '{"kind": 7}'):
        path.write_text(content)
        for kind, document in DOCUMENTS.items():
            with pytest.raises(InputError, match=f"this is something else, not {versioned._NAMES[kind]}"):
                read_document(document, path, remedy="make it again", error=InputError)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_newer_one_says_upgrade_whatever_it_holds(kind: str, tmp_path: Path) -> None:
    path, document = tmp_path / "a.json", DOCUMENTS[kind]
    path.write_text(json.dumps({"kind": kind, "schema_version": 99, "novelty": [1]}))
    with pytest.raises(InputError, match=r"schema version 99 is newer than the supported .*; upgrade dqe-engine"):
        read_document(document, path, remedy="make it again", error=InputError)


def older(key: str) -> list[Path]:
    """Results in the repository that were written before `kind`."""
    found: list[Path] = []
    for path in sorted(RESULTS.glob("*/*.json")):
        content: Any = json.loads(path.read_text())
        if isinstance(content, dict) and key in content and "kind" not in content:
            found.append(path)
    return found


@pytest.mark.parametrize("path", older("benchmark"), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_results_of_benchmarks_from_before_are_read(path: Path) -> None:
    content = json.loads(path.read_text())
    found = report.read(path)
    assert (found.schema_version, found.sections) == (1, content["sections"])
    assert report.load(path, found.benchmark)["sections"] == content["sections"]


@pytest.mark.parametrize("path", older("against"), ids=lambda path: path.name)
def test_results_of_ablations_from_before_are_read(path: Path) -> None:
    found = read_document(Comparison, path, remedy="measure again", error=InputError)
    assert len(found.arms) == len(json.loads(path.read_text())["arms"]) > 1
