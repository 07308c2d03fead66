"""A graph may take weights from one file only: its own, which the manifest lists. Held against the onnx package."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from support.tiny_bundle import build_tiny_heads, write_manifest

from dqe_engine import graph_files
from dqe_engine.bundle import Bundle, build_file_entries
from dqe_engine.contracts.manifest import HEADS_FILE
from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import BundleError
from dqe_engine.graph_files import external_locations
from dqe_engine.heads import load_heads


def tensor(location: str | None) -> TensorProto:
    """Four numbers, in the file `location`."""
    made = numpy_helper.from_array(np.ones(4, np.float32), f"w {location}")
    if location is not None:
        set_external_data(made, location, offset=0, length=16)
        made.ClearField("raw_data")
    return made


def sparse(location: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor(location), indices=tensor(f"{location} indices"), dims=[8])


def constant(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], **attributes)


def branch(location: str, deep: int) -> GraphProto:
    """A graph within a graph, `deep` times."""
    inner = helper.make_graph([], "inner", [], [], initializer=[tensor(location)])
    for _ in range(deep):
        inner = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=inner)], "outer", [], [])
    return inner


def in_node(model: ModelProto, node: onnx.NodeProto) -> None:
    model.graph.node.append(node)


def in_function(model: ModelProto, location: str) -> None:
    function = model.functions.add(name="f", domain="d")
    function.node.append(constant(value=tensor(location)))
    function.attribute_proto.append(helper.make_attribute("a", tensor(f"{location} of a default")))


def in_training(model: ModelProto, location: str) -> None:
    info = model.training_info.add()
    info.algorithm.initializer.append(tensor(location))
    info.initialization.initializer.append(tensor(f"{location} too"))


PLACES: dict[str, Callable[[ModelProto, str], object]] = {
    "initializer": lambda model, where: model.graph.initializer.append(tensor(where)),
    "sparse initializer": lambda model, where: model.graph.sparse_initializer.append(sparse(where)),
    "attribute": lambda model, where: in_node(model, constant(value=tensor(where))),
    "sparse attribute": lambda model, where: in_node(model, constant(sparse_value=sparse(where))),
    "list of an attribute": lambda model, where: in_node(model, helper.make_node("X", [], ["y"], many=[tensor(None), tensor(where)])),
    "sparse list": lambda model, where: in_node(model, helper.make_node("X", [], ["y"], many=[sparse(where)])),
    "subgraph": lambda model, where: in_node(model, helper.make_node("If", ["x"], ["y"], then_branch=branch(where, 10))),
    "list of subgraphs": lambda model, where: in_node(model, helper.make_node("X", [], ["y"], many=[branch(where, 0), branch(where, 1)])),
    "function": in_function,
    "training": in_training,
}


def by_onnx(message: object) -> Iterator[str]:
    """Locations of all tensors in a message, whatever its fields, by the onnx package's own description of itself."""
    if isinstance(message, TensorProto):
        yield from (entry.value for entry in message.external_data if entry.key == "location")
    for _, value in message.ListFields():  # type: ignore[attr-defined]
        for part in value if hasattr(value, "__len__") and not isinstance(value, (str, bytes)) else [value]:
            if hasattr(part, "ListFields"):
                yield from by_onnx(part)


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "copy"))


def edit(file: Path, change: Callable[[ModelProto], object]) -> None:
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("place", PLACES)
def test_every_place_where_a_tensor_may_stand(bundle: Path, place: str) -> None:
    (bundle / "elsewhere").write_bytes(bytes(16))
    file = bundle / "target_encoder.onnx"
    edit(file, lambda model: PLACES[place](model, "elsewhere"))
    expected = set(by_onnx(onnx.load(file, load_external_data=False)))
    assert external_locations(file) == expected
    assert "elsewhere" in expected
    write_manifest(bundle)  # hashes fit, and `elsewhere` is listed: but it is not this graph's own file
    with pytest.raises(BundleError, match=r"target_encoder\.onnx: takes weights from 'elsewhere.*; do not use this bundle") as caught:
        Bundle.load(bundle, verify=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    ["", "/etc/hostname", "../weights", "./target_encoder.onnx.data", "query_encoder.onnx.data", "target_encoder.onnx", "a\0b",
     "*/_ORT_MEM_ADDR_/*", "é"],
)  # fmt: skip
def test_locations_that_are_refused(bundle: Path, location: str) -> None:
    edit(bundle / "target_encoder.onnx", lambda model: model.graph.initializer.append(tensor(location)))
    (bundle / "target_encoder.onnx.data").write_bytes(bytes(16))
    write_manifest(bundle)
    with pytest.raises(BundleError, match="takes weights from"):
        Bundle.load(bundle)


def test_its_own_weights_are_taken_where_the_manifest_lists_them(bundle: Path) -> None:
    edit(bundle / "target_encoder.onnx", lambda model: model.graph.initializer.append(tensor("target_encoder.onnx.data")))
    write_manifest(bundle)
    (bundle / "target_encoder.onnx.data").write_bytes(bytes(16))  # there, but not listed
    with pytest.raises(BundleError, match="expected weights within the graph: the manifest lists no other file"):
        Bundle.load(bundle)
    write_manifest(bundle)
    assert Bundle.load(bundle).path == bundle


def test_attribute_heads_alone(tmp_path: Path) -> None:
    heads = build_tiny_heads(tmp_path / "heads")
    manifest = load_heads(heads)
    edit(heads / "attribute_heads.onnx", lambda model: model.graph.initializer.append(tensor("elsewhere")))
    entries = tuple(entry for entry in build_file_entries(heads) if entry.path != HEADS_FILE)
    (heads / HEADS_FILE).write_bytes(to_json({**{f: getattr(manifest, f) for f in manifest.__struct_fields__}, "files": entries}))
    with pytest.raises(BundleError, match="takes weights from 'elsewhere'"):
        load_heads(heads)


def test_fields_that_are_merged(tmp_path: Path) -> None:
    """One part of an attribute's tensor says where, the next that it is elsewhere: protobuf makes one of them."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    where = field(13, field(1, b"location") + field(2, b"first") + field(2, b"second"))
    attribute = field(5, where) + field(5, b"\x70\x01") + b"\xa0\x01\x04"  # data_location: EXTERNAL; type: TENSOR
    file = tmp_path / "graph.onnx"
    file.write_bytes(field(7, field(1, field(5, attribute))))
    parsed = onnx.load(file, load_external_data=False).graph.node[0].attribute[0]
    assert (parsed.type, parsed.t.data_location) == (AttributeProto.TENSOR, TensorProto.EXTERNAL)
    assert external_locations(file) == {"first", "second"}


def test_parts_that_a_provider_compiled(bundle: Path) -> None:
    edit(bundle / "target_encoder.onnx", lambda model: in_node(model, helper.make_node("EPContext", [], ["y"], domain="com.microsoft")))
    write_manifest(bundle)
    with pytest.raises(BundleError, match=r"compiled parts \(EPContext\)"):
        Bundle.load(bundle)


def test_hostile_bytes(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut, nested without end, or of lengths beyond the file is refused in one line; nothing is read past its end."""
    file = tmp_path / "graph.onnx"
    whole = (bundle_path / "query_encoder.onnx").read_bytes()
    nested = b""
    for number in (*(6, 5, 1) * 60, 7):  # a graph in an attribute of a node of a graph
        nested = bytes([number << 3 | 2]) + varint(len(nested)) + nested
    for content, message in (
        (whole[:-1], "longer than what holds it"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "longer than what holds it"),
        (b"\x3a" + b"\xff" * 20, "a number without an end"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x02\x00", "number 0"),
        (b"\x3a\x02\x0a\x05abcde", "longer than what holds it"),  # longer than the graph, not than the file
        (nested, "within one another"),
        (b"ORTM" * 8, "not an ONNX graph"),
    ):
        file.write_bytes(content)
        with pytest.raises(BundleError, match=message) as caught:
            external_locations(file)
        assert "\n" not in str(caught.value)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged[: rng.integers(len(whole))])
        with contextlib.suppress(BundleError):
            external_locations(file)
    monkeypatch.setattr(graph_files, "MOST_FIELDS", 1000)
    file.write_bytes(b"\x08\x00" * 1001)
    with pytest.raises(BundleError, match="more than 1000 fields"):
        external_locations(file)
    file.write_bytes(b"")
    assert external_locations(file) == set()


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def test_weights_are_skipped_by_their_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte within the graph costs no more than its lengths, three fields."""
    file, size = tmp_path / "graph.onnx", 1 << 30
    raw = b"\x4a" + varint(size)
    inner = b"\x2a" + varint(len(raw) + size) + raw
    with file.open("wb") as stream:
        stream.write(b"\x3a" + varint(len(inner) + size) + inner)
        stream.truncate(stream.tell() + size)  # sparse: no disk is written
    monkeypatch.setattr(graph_files, "MOST_FIELDS", 3)
    assert external_locations(file) == set()
