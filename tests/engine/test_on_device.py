"""Tokens that stay on the device of the graphs. Here that is ONNX Runtime's "cpu", on which the same code runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.host_driver import HostDriver
from support.samples import noise_image
from support.tiny_bundle import query_inputs

from dqe_engine import device_arrays, device_tokens, encoder
from dqe_engine.bundle import Bundle
from dqe_engine.caches import ArrayCache
from dqe_engine.contracts.graphs import QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.device_arrays import CPU_DEVICE, CUDA_DEVICE, ForeignArray
from dqe_engine.device_tokens import copied, stacked, to_host
from dqe_engine.encoder import PASSED_ON
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, InputError
from dqe_engine.query import Query
from dqe_engine.sessions import GraphSession, OnnxSession
from dqe_engine.zones import select_zones

HERE = (CPU_DEVICE, 0)


def session_on_device(bundle: Bundle, spec: GraphSpec) -> OnnxSession:
    session = bundle.session(spec, provider="cpu", threads=1)
    assert isinstance(session, OnnxSession)
    session.device = HERE
    return session


@pytest.fixture
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.load(bundle_path)


@pytest.fixture
def plain(engine: RetrievalEngine, image_folder: Path) -> RetrievalEngine:
    engine.index_images(image_folder)
    return engine


@pytest.fixture
def make_resident(bundle: Bundle, plain: RetrievalEngine) -> Callable[..., RetrievalEngine]:
    """An engine over the same index whose graphs are on a device, but for some."""

    def make(*elsewhere: str, **options: Any) -> RetrievalEngine:
        def open_graph(spec: GraphSpec) -> GraphSession:
            return bundle.session(spec, provider="cpu", threads=1) if spec.name in elsewhere else session_on_device(bundle, spec)

        return RetrievalEngine(bundle, open_graph, index=plain.index, threads=1, **options)

    return make


def upload(seed: int) -> bytes:
    written = io.BytesIO()
    noise_image(seed).save(written, "PNG")
    return written.getvalue()


@pytest.fixture
def brought_home(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the encoder copied from the device to the host, and of what graphs left there besides what ends there."""
    shapes: list[tuple[int, ...]] = []
    run = OnnxSession.run_keeping

    def run_and_look(session: OnnxSession, keep: Any, /, **inputs: Any) -> Any:
        outputs = run(session, keep, **inputs)
        if session.device is not None:
            ends = {"base_query", "sub_queries", "attribute_weights", "target_tokens"}
            shapes.extend(
                value.shape for name, value in outputs.items() if isinstance(value, np.ndarray) and len(value) and name not in ends
            )
        return outputs

    def spy(array: Any) -> Any:
        if isinstance(array, ForeignArray):
            shapes.append(array.shape)
        return to_host(array)

    monkeypatch.setattr(encoder, "to_host", spy)
    monkeypatch.setattr(OnnxSession, "run_keeping", run_and_look)
    return shapes


BATCHES: dict[str, Callable[[], Sequence[Query]]] = {
    "one upload": lambda: [Query(image=upload(1), text="in red")],
    "three uploads": lambda: [Query(image=upload(n), text="in red") for n in (1, 2, 3)],
    "one upload twice": lambda: [Query(image=upload(1), text=text) for text in ("in red", "in blue")],
    "an image that is no bytes": lambda: [Query(image=noise_image(4), text="in red")],
    "an item": lambda: [Query(reference_id="00.png", text="in red")],
    "all kinds": lambda: [
        Query(text="in red"), Query(image=upload(5), text="in red"), Query(reference_id="02.png", text="in blue"), Query(image=upload(6)),
        Query(image=upload(7), text="round"), Query(reference_id="04.png"),
    ],
    "images alone": lambda: [Query(image=upload(n)) for n in (1, 2)],
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_queries_are_the_same_to_the_bit_and_nothing_comes_home_between_graphs(
    name: str, plain: RetrievalEngine, make_resident: Callable[..., RetrievalEngine], brought_home: list[Any]
) -> None:
    resident = make_resident()
    for remembered in (False, True):  # the second time, of the uploads' tokens
        found, expected = (one.encode_queries(BATCHES[name]()) for one in (resident, plain))
        for field in ("queries", "predicted_weights", "weights"):
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=f"{field}, {remembered}")
        resident._encoder.fused, plain._encoder.fused = (type(resident._encoder.fused)(1 << 20) for _ in range(2))
        assert resident.remembered["uploads"] == plain.remembered["uploads"]
    assert brought_home == []
    assert resident.search(Query(image=upload(8), text="red")).hits == plain.search(Query(image=upload(8), text="red")).hits


def test_images_are_the_same_and_their_tokens_come_home_once(
    plain: RetrievalEngine, make_resident: Callable[..., RetrievalEngine], brought_home: list[Any]
) -> None:
    images = [noise_image(n) for n in range(3)]
    found, expected = (one.encode_images(images) for one in (make_resident(), plain))
    np.testing.assert_array_equal(found.target_tokens, expected.target_tokens)
    np.testing.assert_array_equal(found.image_tokens, expected.image_tokens)
    assert brought_home == [expected.image_tokens.shape]
    assert make_resident().encode_images([]).image_tokens.shape == (0, *expected.image_tokens.shape[1:])


@pytest.mark.parametrize("elsewhere", ["vision_encoder", "attribute_heads"])
def test_graphs_on_different_providers_hand_over_numpy_arrays(
    elsewhere: str, plain: RetrievalEngine, make_resident: Callable[..., RetrievalEngine]
) -> None:
    mixed = make_resident(elsewhere)
    found, expected = (one.encode_queries(BATCHES["all kinds"]()) for one in (mixed, plain))
    np.testing.assert_array_equal(found.queries, expected.queries)
    kept = mixed._encoder.uploads.peek(next(iter(mixed._encoder.uploads._kept)))
    assert kept is not None
    assert isinstance(kept[0], np.ndarray)


def test_tokens_that_are_kept_have_memory_of_their_own_within_the_budget(
    bundle: Bundle, make_resident: Callable[..., RetrievalEngine]
) -> None:
    one = 4 * bundle.sizes.image_tokens * bundle.sizes.vision_width
    resident = make_resident(kept_bytes=3 * (one + 1000))
    resident.encode_queries([Query(image=upload(n), text="in red") for n in range(8)])
    kept = [arrays[0] for arrays in resident._encoder.uploads._kept.values()]
    assert 1 <= len(kept) <= 3
    assert resident.remembered["uploads"].bytes <= 3 * (one + 1000)
    for tokens in kept:
        assert isinstance(tokens, ForeignArray)
        assert isinstance(tokens.owner, ForeignArray)
        assert tokens.owner.nbytes == tokens.nbytes == one  # else one row would hold its whole batch


def test_the_output_of_one_graph_is_the_input_of_the_next(bundle: Bundle) -> None:
    vision, target = (session_on_device(bundle, spec) for spec in (VISION_ENCODER, TARGET_ENCODER))
    pixels = np.random.default_rng(0).random((2, 3, 32, 32)).astype(np.float32)
    kept = vision.run_keeping(["image_tokens"], pixel_values=pixels)["image_tokens"]
    assert isinstance(kept, ForeignArray)
    assert stacked([kept[0], kept[1]], kept.shape[1:]) is kept
    plain = vision.run(pixel_values=pixels)["image_tokens"]
    np.testing.assert_array_equal(to_host(kept), plain)
    targets = [target.run(image_tokens=tokens)["target_tokens"] for tokens in (kept, plain)]
    np.testing.assert_array_equal(*targets)


def test_a_query_goes_from_its_graph_to_the_search_by_dlpack(bundle: Bundle) -> None:
    session, inputs = session_on_device(bundle, QUERY_ENCODER), query_inputs(3, 5)
    outputs = session.run_keeping(("base_query", *PASSED_ON), **inputs)
    assert all(isinstance(value, ForeignArray) for value in outputs.values())
    queries = np.from_dlpack(outputs["base_query"])
    assert queries.ctypes.data == outputs["base_query"].address, "a copy"
    items = np.random.default_rng(0).standard_normal((50, queries.shape[1])).astype(np.float32)
    found, expected = (select_zones(given, items, k=7) for given in (queries, session.run(**inputs)["base_query"]))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("device", [HERE, (CUDA_DEVICE, 0)])
def test_rows_from_anywhere_become_one_batch(device: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA by a stand-in for its driver, whose device memory is the host's."""
    from onnxruntime import OrtValue

    allocate = OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setattr(OrtValue, "ortvalue_from_shape_and_type", lambda shape, kind, name, number: allocate(shape, kind, "cpu", 0))
    monkeypatch.setattr(device_arrays, "load_library", lambda name: HostDriver())
    batch = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    there = ForeignArray(batch.ctypes.data, batch.shape, batch.dtype, device)
    half = (batch[0] + 0.5).astype(np.float16)[:, ::-1]
    rows = [there[2], None, half, there[0], copied(there[1])]
    made = stacked(rows, (3, 2))
    assert isinstance(made, ForeignArray)
    assert made.device == device
    expected = np.stack([batch[2], np.zeros((3, 2)), half, batch[0], batch[1]])
    np.testing.assert_array_equal(to_host(made), expected)
    assert isinstance(stacked([None, half], (3, 2)), np.ndarray), "nothing is on a device, so nothing goes there ahead of the graph"
    for fewer in ([there[0]], [there[1], there[0], there[2], there[3]]):
        assert stacked(fewer, (3, 2)) is not there
    assert stacked(list(there), (3, 2)) is there
    with pytest.raises(InputError, match=r"^image tokens on \w+:0 and on cuda:1; run all graphs on one device$"):
        stacked([there[0], ForeignArray(0, (3, 2), batch.dtype, (CUDA_DEVICE, 1))], (3, 2))


@pytest.mark.parametrize(
    ("session", "given", "message"),
    [
        (None, HERE, r"^target_encoder.image_tokens: on cpu:0, and this graph takes NumPy arrays; open all graphs on one provider$"),
        (
            HERE,
            (CUDA_DEVICE, 0),
            r"^target_encoder.image_tokens: on cuda:0, and this graph runs on cpu:0; open all graphs on one provider$",
        ),
        ((CUDA_DEVICE, 0), (CUDA_DEVICE, 1), r"on cuda:1, and this graph runs on cuda:0"),
        (HERE, (10, 0), r"on DLPack device 10:0, and"),
    ],
)
def test_tokens_of_another_device_are_refused(bundle: Bundle, session: Any, given: Any, message: str) -> None:
    target, tokens = session_on_device(bundle, TARGET_ENCODER), np.zeros((1, 16, 12), np.float32)
    target.device = session
    with pytest.raises(InputError, match=message):
        target.run(image_tokens=ForeignArray(tokens.ctypes.data, tokens.shape, tokens.dtype, given))


def test_memory_that_runs_out_is_told_in_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("BFCArena: Failed to allocate memory\n  for requested buffer of size 1537")

    vision = session_on_device(bundle, VISION_ENCODER)
    inner = vision._session
    vision._session = type("Full", (), {"io_binding": inner.io_binding, "run_with_iobinding": staticmethod(full)})()
    with pytest.raises(BackendError, match=r"^vision_encoder failed on cpu: BFCArena: Failed to allocate memory for requested buffer of"):
        vision.run(pixel_values=np.zeros((1, 3, 32, 32), np.float32))
    from onnxruntime import OrtValue

    monkeypatch.setattr(OrtValue, "ortvalue_from_shape_and_type", full)
    tokens = np.zeros((2, 3), np.float32)
    with pytest.raises(
        BackendError,
        match=r"^no memory on cpu:0 for image tokens of shape \(1, 3\), pass fewer images at a time: BFCArena: Failed to allocate",
    ):
        copied(ForeignArray(tokens.ctypes.data, tokens.shape, tokens.dtype, HERE)[0])
    kept: ArrayCache[ForeignArray] = ArrayCache(1 << 20)
    kept.put("question", (ForeignArray(tokens.ctypes.data, tokens.shape, tokens.dtype, HERE)[0],))
    assert kept.get("question") is None, "a question whose tokens can't be kept is answered all the same"
    assert copied(one := ForeignArray(tokens.ctypes.data, (1, 3), tokens.dtype, HERE)[0]) is one, "needs no memory"
    assert device_tokens.place_name((CUDA_DEVICE, 3)) == "cuda:3"
