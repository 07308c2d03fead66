"""A bundle: every file against its hash, and each graph once on each provider that works, at its smallest shape."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import GraphSizes, GraphSpec
from dqe_engine.errors import DQEError

from .findings import Context, Finding, Steps, Trying

SMALLEST = {"batch": 1, "text_length": 2}
_EXPORT = "copy the bundle again, or make it anew with dqe-export"


def probe(context: Context) -> Steps:
    assert context.bundle is not None
    yield Trying("files", _EXPORT)
    try:
        bundle = Bundle.load(context.bundle)
    except DQEError as error:
        what, separator, remedy = str(error).rpartition("; ")  # our errors end in what to do
        yield Finding("files", "broken", what if separator else remedy, remedy if separator else _EXPORT)
        return
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files)
    found = f"{manifest.name}, {manifest.precision}: {len(manifest.files)} files, {_human(size)}, as they were exported"
    facts = {"name": manifest.name, "model_hash": bundle.model_hash, "bytes": size}
    if bundle.origin is not None:
        found, facts = f"{found}; {bundle.origin}", facts | {"origin": bundle.origin}
    yield Finding("files", "ok", found, facts=facts)
    if not context.providers:
        yield Finding("graphs", "not available", "no provider works", "see ONNX Runtime")
    for provider in context.providers:
        for graph in manifest.graphs:
            name = f"{graph.name}, {provider}"
            yield Trying(name, _EXPORT if provider == "cpu" else f"use --provider cpu until the provider {provider} runs this graph")
            yield _run(bundle, graph, provider, name)


def _human(size: int) -> str:
    unit = "kB" if size < 1e6 else "MB" if size < 1e9 else "GB"
    return f"{size / {'kB': 1e3, 'MB': 1e6, 'GB': 1e9}[unit]:.1f} {unit}"


def _run(bundle: Bundle, graph: GraphSpec, provider: Any, name: str) -> Finding:
    session = bundle.session(graph, provider=provider)
    started = time.perf_counter()
    outputs = session.run(**_inputs(graph, bundle.sizes))
    milliseconds = (time.perf_counter() - started) * 1e3
    for output, array in outputs.items():
        if not np.isfinite(array).all():
            return Finding(name, "broken", f"{output} holds values that are not finite", _EXPORT)
    return Finding(name, "ok", f"runs; the first time took {milliseconds:.1f} ms", facts={"first_ms": milliseconds})


def _inputs(graph: GraphSpec, sizes: GraphSizes) -> dict[str, NDArray[Any]]:
    """Ones: a token id that every vocabulary has, a mask that hides nothing, an image of one colour."""
    return {tensor.name: np.ones(tensor.shape(sizes, **SMALLEST), tensor.dtype) for tensor in graph.inputs}
