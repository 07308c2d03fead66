from __future__ import annotations

import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
from support.tiny_bundle import SIZES, query_inputs

from dqe_engine import sessions
from dqe_engine.contracts.graphs import QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER
from dqe_engine.errors import BackendError, BundleError, InputError
from dqe_engine.sessions import OnnxSession, text_buckets


@pytest.fixture(scope="module")
def query_session(bundle_path: Path) -> OnnxSession:
    return OnnxSession(bundle_path / QUERY_ENCODER.file, QUERY_ENCODER, SIZES, provider="cpu", threads=1)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (1, 2), (3, 7)])
def test_outputs_by_name(query_session: OnnxSession, batch: int, length: int) -> None:
    outputs = query_session.run(**query_inputs(batch, length))
    assert {name: array.shape for name, array in outputs.items()} == {
        "base_query": (batch, 8),
        "fused_queries": (batch, 2, 8),
        "fused_text": (batch, length, 8),
        "word_embeddings": (batch, length, 8),
    }
    assert all(array.dtype == np.float32 for array in outputs.values())


def test_rows_do_not_depend_on_their_batch(query_session: OnnxSession) -> None:
    inputs = query_inputs(5)
    together = query_session.run(**inputs)
    alone = query_session.run(**{name: array[2:3] for name, array in inputs.items()})
    for name, array in alone.items():
        np.testing.assert_allclose(array[0], together[name][2], rtol=0, atol=1e-6)


def test_strided_inputs(query_session: OnnxSession) -> None:
    inputs = query_inputs(4)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in inputs.items()}
    np.testing.assert_array_equal(query_session.run(**strided)["base_query"], query_session.run(**inputs)["base_query"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "query_encoder takes attention_mask, image_tokens, input_ids"),
        ({"extra": np.zeros(1)}, "query_encoder takes"),
        ({"input_ids": np.zeros((3, 4), np.int32)}, "input_ids: expected int64, got int32"),
        ({"image_tokens": np.zeros((3, 16, 12))}, "image_tokens: expected float32, got float64"),
        ({"image_tokens": np.zeros((3, 16, 11), np.float32)}, r"image_tokens: expected shape \(3, 16, 12\), got \(3, 16, 11\)"),
        ({"image_tokens": np.zeros((16, 12), np.float32)}, r"image_tokens: expected shape \(batch, 16, 12\), got \(16, 12\)"),
        ({"input_ids": np.zeros((2, 4), np.int64)}, r"input_ids: expected shape \(3, 4\), got \(2, 4\)"),
        ({"attention_mask": np.zeros((3, 5), np.int64)}, r"attention_mask: expected shape \(3, 4\), got \(3, 5\)"),
        ({"input_ids": np.zeros(3, np.int64)}, r"input_ids: expected shape \(3, text_length\), got \(3,\)"),
    ],
)
def test_inputs_that_do_not_fit(query_session: OnnxSession, change: dict[str, Any], message: str) -> None:
    inputs = {name: array for name, array in (query_inputs(3) | change).items() if array is not None}
    with pytest.raises(InputError, match=message):
        query_session.run(**inputs)


def test_what_the_runtime_refuses_is_a_backend_error(query_session: OnnxSession) -> None:
    inputs = query_inputs(1)
    inputs["input_ids"][:] = 10_000  # no such embedding
    with pytest.raises(BackendError, match="query_encoder failed on cpu"):
        query_session.run(**inputs)


def test_lengths_to_pad_texts_to(query_session: OnnxSession) -> None:
    padding, other, none = (types.SimpleNamespace(text_buckets=buckets) for buckets in ((8, 16), (4,), ()))
    assert text_buckets(query_session, query_session) == ()  # any length is as good as the next one to ONNX Runtime
    assert text_buckets(padding, other) == text_buckets(none, padding) == text_buckets(query_session, padding) == (8, 16)


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    for name in ("broken.onnx", "absent.onnx"):
        with pytest.raises(BundleError, match="cannot load it"):
            OnnxSession(tmp_path / name, VISION_ENCODER, SIZES, provider="cpu")


def test_graphs_that_are_not_the_specs(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="inputs are pixel_values, the manifest says image_tokens"):
        OnnxSession(bundle_path / VISION_ENCODER.file, TARGET_ENCODER, SIZES, provider="cpu")
    with pytest.raises(BundleError, match="output target_tokens: axis 'embedding_dim' is fixed at 8, expected 9"):
        OnnxSession(bundle_path / TARGET_ENCODER.file, TARGET_ENCODER, msgspec.structs.replace(SIZES, embedding_dim=9), provider="cpu")
    model = onnx.load(bundle_path / VISION_ENCODER.file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1  # what an export with an example batch of 1 leaves
    onnx.save(model, tmp_path / "baked.onnx")
    with pytest.raises(BundleError, match="axis 'batch' is fixed at 1"):
        OnnxSession(tmp_path / "baked.onnx", VISION_ENCODER, SIZES, provider="cpu")


def test_graph_next_to_spaces_and_unicode(bundle_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "größe 1" / "vision_encoder.onnx"
    path.parent.mkdir()
    shutil.copy(bundle_path / "vision_encoder.onnx", path)
    assert OnnxSession(path, VISION_ENCODER, SIZES, provider="cpu").provider == "cpu"


class Spy:
    """A session of ONNX Runtime that notes who runs how much of a batch."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.ran: list[tuple[str, int]] = []

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> Any:
        self.ran.append((threading.current_thread().name.split("_")[0], len(inputs["input_ids"])))
        return self.session.run(names, inputs)


def in_parts(path: Path, monkeypatch: pytest.MonkeyPatch, *, little: int, threads: int | None) -> tuple[OnnxSession, Spy]:
    """A session to which `little` rows are little work, its data beside the graph included."""
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    monkeypatch.setattr(sessions, "LITTLE_WORK", little * size * SIZES.image_tokens)
    session = OnnxSession(path, QUERY_ENCODER, SIZES, provider="cpu", threads=threads)
    spy = Spy(session._session)
    monkeypatch.setattr(session, "_session", spy)
    return session, spy


@pytest.mark.parametrize("beside", [0, 5_000])
@pytest.mark.parametrize(
    ("little", "threads", "batch", "parts"),
    [
        (4, 2, 1, [1]), (4, 2, 4, [4]), (4, 2, 7, [7]), (4, 2, 8, [4, 4]), (1, 2, 19, [9, 10]), (2, 3, 5, [2, 3]),
        (2, 3, 111, [37, 37, 37]), (4, 1, 64, [64]), (0, 2, 64, [64]),
    ],
)  # fmt: skip
def test_a_batch_is_split_among_threads(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query_session: OnnxSession, beside: int, little: int, threads: int,
    batch: int, parts: list[int],
) -> None:  # fmt: skip
    shutil.copy(bundle_path / QUERY_ENCODER.file, tmp_path)
    if beside:
        (tmp_path / f"{QUERY_ENCODER.file}.data").write_bytes(bytes(beside))
    session, spy = in_parts(tmp_path / QUERY_ENCODER.file, monkeypatch, little=little, threads=threads)
    inputs = query_inputs(batch)
    expected = query_session.run(**inputs)
    found = session.run(**inputs)
    assert sorted(size for _, size in spy.ran) == parts
    assert ("MainThread", batch // len(parts) + (batch % len(parts) > 0)) in spy.ran
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)


def test_threads_of_one_operator_are_for_large_graphs(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for little, threads in ((1, 1), (0, 3)):
        _, spy = in_parts(bundle_path / QUERY_ENCODER.file, monkeypatch, little=little, threads=3)
        assert spy.session.get_session_options().intra_op_num_threads == threads


def test_all_processors_unless_told(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "available_cpus", lambda: 3)
    session, spy = in_parts(bundle_path / QUERY_ENCODER.file, monkeypatch, little=1, threads=None)
    session.run(**query_inputs(6))
    assert [size for _, size in spy.ran] == [2, 2, 2]


@pytest.mark.parametrize("why", ["busy", "none"])
def test_nobody_waits_for_a_helper(bundle_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    session, spy = in_parts(bundle_path / QUERY_ENCODER.file, monkeypatch, little=1, threads=2)
    helpers = session._helpers
    assert helpers is not None
    free = threading.Event()
    if why == "busy":
        helpers.submit(free.wait)
    else:  # what a limit on threads or the end of the interpreter does
        helpers.shutdown()
    try:
        found = session.run(**query_inputs(5))
    finally:
        free.set()
    assert spy.ran == [("MainThread", 3), ("MainThread", 2)]
    for name, array in zip(found, spy.session.run(list(found), query_inputs(5)), strict=True):
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)


def test_a_part_that_fails_is_told(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = in_parts(bundle_path / QUERY_ENCODER.file, monkeypatch, little=1, threads=2)
    inputs = query_inputs(4)
    inputs["input_ids"][3] = 10_000  # of the helper's part: beyond the table of words
    with pytest.raises(BackendError, match="query_encoder failed on cpu"):
        session.run(**inputs)


def test_callers_at_once(bundle_path: Path, monkeypatch: pytest.MonkeyPatch, query_session: OnnxSession) -> None:
    session, _ = in_parts(bundle_path / QUERY_ENCODER.file, monkeypatch, little=1, threads=3)
    inputs = [query_inputs(batch) for batch in range(1, 21)]
    expected = [query_session.run(**each) for each in inputs]
    with ThreadPoolExecutor(4) as callers:
        for found, wanted in zip(callers.map(lambda each: session.run(**each), inputs), expected, strict=True):
            for name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6)
