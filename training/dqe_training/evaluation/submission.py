"""Files for the CIRR and CIRCO test servers: made from rankings, held against the servers' rules before they are written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError
from dqe_engine.files import atomic_write, describe_os_error, describe_write_error, read_regular

from ..data.public.base import Benchmark
from ..data.public.detect import open_benchmark
from ..data.queries import Query, QuerySet
from .metrics import filter_ranking

CIRR_NAMES = {"recall": 50, "recall_subset": 3}
"""How many names a query has in CIRR's two files, by their `metric`."""

CIRCO_IDS = 50
MAX_BYTES = 5_000_000
"""CIRR's server takes 5 MB; read as powers of ten, which is the smaller."""

Files = dict[str, dict[str, Any]]


def submission(dataset: str, split: str, queries: QuerySet, ranked: NDArray[np.int64]) -> Files:
    """File name to content, checked. `ranked` (Q, depth) gallery positions. Raises InputError where a rule is broken."""
    contents = _cirr_contents(queries, ranked) if dataset == "cirr" else [_circo_content(queries, ranked)]
    files = {path.name: content for path, content in zip(planned_files(Path(), dataset, split), contents, strict=True)}
    for name, content in files.items():
        check_content(content, dataset, queries.queries, queries.position, where=name)
        _check_size(encode(content), where=name)
    return files


def _cirr_contents(queries: QuerySet, ranked: NDArray[np.int64]) -> list[dict[str, Any]]:
    subset = filter_ranking(ranked, [queries.positions(query.subset) for query in queries.queries])
    contents = []
    for (metric, length), rankings in zip(CIRR_NAMES.items(), (ranked, subset), strict=True):
        lists = {q.id: _names(queries, row[:length]) for q, row in zip(queries.queries, rankings, strict=True)}
        contents.append({"version": "rc2", "metric": metric, **lists})
    return contents


def _circo_content(queries: QuerySet, ranked: NDArray[np.int64]) -> dict[str, Any]:
    return {q.id: [int(id) for id in _names(queries, row[:CIRCO_IDS])] for q, row in zip(queries.queries, ranked, strict=True)}


def _names(queries: QuerySet, row: NDArray[np.int64]) -> list[str]:
    return [queries.gallery[at] for at in row.tolist() if at >= 0]


def encode(content: Mapping[str, Any]) -> bytes:
    """As the datasets' own examples are written."""
    return json.dumps(content).encode()


def write_submission(directory: Path, files: Files) -> list[Path]:
    """Write checked files to `directory`, each whole or not at all."""
    paths = []
    for name, content in files.items():
        try:
            with atomic_write(directory / name) as stream:
                stream.write(encode(content))
        except OSError as error:
            raise InputError(describe_write_error(error, directory / name)) from error
        paths.append(directory / name)
    return paths


def planned_files(directory: Path, dataset: str, split: str) -> list[Path]:
    """What a submission will consist of. Raises InputError for a dataset without a server."""
    if dataset == "cirr":
        return [directory / f"cirr-{split}-{metric}.json" for metric in CIRR_NAMES]
    if dataset == "circo":
        return [directory / f"circo-{split}.json"]
    raise InputError(f"--submission: {dataset} has no test server; CIRR and CIRCO have")


# -- the servers' rules -------------------------------------------------------------------------------------------------


def check_content(
    content: Mapping[str, Any], dataset: str, queries: Sequence[Query], gallery: Mapping[str, int] | None, *, where: str
) -> str:
    """Hold a submission against the rules; returns one line of what it is. `gallery`: ids that may occur, where known.

    Raises InputError for the first broken rule, with the query.
    """
    if dataset == "circo":
        _check_lists(content, queries, CIRCO_IDS, int, lambda id: f"{id:012d}", gallery, where=where)
        return f"{len(queries)} queries of {CIRCO_IDS} ids"
    version, metric = content.get("version"), content.get("metric")
    if version != "rc2" or not isinstance(metric, str) or metric not in CIRR_NAMES:
        raise InputError(f'{where}: version {version!r} and metric {metric!r}, expected "rc2" and "recall" or "recall_subset"')
    lists = {id: names for id, names in content.items() if id not in ("version", "metric")}
    _check_lists(lists, queries, CIRR_NAMES[metric], str, str, gallery, where=where)
    for query in queries:
        names = lists[query.id]
        if query.reference in names:
            raise InputError(f"{where}, query {query.id}: its reference {query.reference} is in its list; leave it out")
        if metric == "recall_subset" and (foreign := [name for name in names if name not in query.subset]):
            raise InputError(f"{where}, query {query.id}: {foreign[0]} is not of its image set; expected members of it")
    return f"{metric}: {len(queries)} queries of {CIRR_NAMES[metric]} names"


def _check_lists(
    lists: Mapping[str, Any],
    queries: Sequence[Query],
    length: int,
    kind: type,
    id_of: Callable[[Any], str],
    gallery: Mapping[str, int] | None,
    *,
    where: str,
) -> None:
    expected = {query.id for query in queries}
    lacking, unknown = [id for id in expected if id not in lists], [id for id in lists if id not in expected]
    if lacking or unknown:
        example = f"no list for query {min(lacking)}" if lacking else f"a list for {unknown[0]!r}, which is no query"
        raise InputError(f"{where}: {len(lists)} lists for {len(expected)} queries; {example}")
    for id, names in lists.items():
        if not isinstance(names, list) or any(type(name) is not kind for name in names):
            raise InputError(f"{where}, query {id}: expected a list of {kind.__name__}")
        if len(names) != length:
            raise InputError(f"{where}, query {id}: {len(names)} names, expected {length}")
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise InputError(f"{where}, query {id}: {name} stands {count} times in its list; every image may occur once")
        if gallery is not None and (foreign := [name for name in names if id_of(name) not in gallery]):
            raise InputError(f"{where}, query {id}: {foreign[0]} is not in the gallery")


def _check_size(raw: bytes, *, where: str) -> None:
    if len(raw) > MAX_BYTES:
        raise InputError(f"{where}: {len(raw)} bytes, the limit is {MAX_BYTES}")


# -- existing files -----------------------------------------------------------------------------------------------------


def open_for_submission(directory: Path, name: str = "auto") -> Benchmark:
    """CIRR or CIRCO in `directory`. Raises InputError for anything else."""
    benchmark = open_benchmark(directory, name)
    if benchmark is None or benchmark.name not in ("cirr", "circo"):
        raise InputError(f"{directory}: submissions are for CIRR and CIRCO, here is {benchmark.name if benchmark else 'neither'}")
    return benchmark


def check_file(path: Path, benchmark: Benchmark, split: str | None = None) -> str:
    """Hold a file against the server's rules; returns one line of what it is. Raises InputError for the first broken rule."""
    split = split or benchmark.splits[-1]
    try:
        raw = read_regular(path)
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
    _check_size(raw, where=str(path))
    try:
        # As the servers read it: text in UTF-8, without the byte order mark and the other encodings that json.loads takes as bytes.
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of lists, got {type(content).__name__}")
    part = next((part for part in benchmark.parts(None) if part.split == split), None)
    if part is None or part.queries is None:
        raise InputError(f"{benchmark.directory}: no queries of {benchmark.name} {split!r} here; splits are {', '.join(benchmark.splits)}")
    gallery = part.galleries.get("original")
    known = None if gallery is None else {id: at for at, id in enumerate(gallery)}
    return f"{benchmark.name} {split}, {check_content(content, benchmark.name, part.queries, known, where=str(path))}: in order"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated!r} occurs twice")
    return content
