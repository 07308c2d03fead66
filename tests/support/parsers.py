"""What reads files, filters and ids that a stranger or a damaged disk may have made: each with an input that is good."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from support.mining_workers import job
from support.samples import image_rows, noise_image, query_rows, target_rows
from support.tiny_bundle import TOLERANCE, build_tiny_bundle, build_tiny_heads, build_tokenizer

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.engines import EngineEntry, EngineManifest, Profile
from dqe_engine.contracts.manifest import FileEntry, GraphParity
from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY, AttributeVocabulary
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import DQEError
from dqe_engine.heads import load_heads
from dqe_engine.index import GalleryIndex
from dqe_engine.index.metadata_file import read_metadata
from dqe_engine.query import Query
from dqe_engine.tensorrt.engines import read_plan, read_sidecar
from dqe_engine.text import TextEncoder
from dqe_engine.zones.mined_folder import read_mined
from dqe_engine.zones.mining_folder import mine_to_folder
from dqe_export.tensorrt.plan import traffic_profile

Parser = Callable[[bytes], object]


def parsers(root: Path) -> dict[str, tuple[bytes, Parser]]:
    """By name: a good input, and what reads it. Files are written below `root`."""
    return dict(_parsers(root))


def check_line(error: Exception) -> None:
    """Its message is one line, printable, and no page."""
    text = str(error)
    assert text.strip(), "an error without words"
    assert "\n" not in text, f"an error of several lines: {text[:300]!r}"
    text.encode()
    assert len(text) < 20_000, f"an error of {len(text)} characters: {text[:300]!r}"


def _parsers(root: Path) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    metadata = [{"n": n, "s": "ab"[n % 2], "tags": ["x", n, None], "b": n == 1, "d": {"e": 1.5}, "z": None} for n in range(5)]
    index = GalleryIndex(model_hash="m" * 32, target_shape=(2, 4), image_shape=(3, 5), image_storage="f16")
    index.add([f"i{n}" for n in range(5)], target_rows(5), image_rows(5), metadata)
    index.remove(["i1"])
    yield from _of_an_index(root, index)
    yield from _of_a_bundle(root)
    yield from _of_calls(root, index)
    yield from _of_metadata(root)
    yield from _of_queries(root)
    yield from _of_profiles(root)
    yield from _of_mining(root)


def _of_an_index(root: Path, index: GalleryIndex) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    saved = root / "index"
    index.save(saved)
    index.update_metadata({"i2": {"n": 1}})
    index.save(saved)
    manifest = json.loads((saved / "manifest.json").read_bytes())

    def use(found: GalleryIndex) -> None:
        found.search(query_rows(1), 3, filter={"n": {">": 1}})
        list(found)
        found.count({"s": "a", "tags": {"contains": "x"}})
        found.stats()

    def index_manifest(data: bytes) -> None:
        (saved / "manifest.json").write_bytes(data)
        use(GalleryIndex.load(saved, verify=True))

    yield "index manifest", ((saved / "manifest.json").read_bytes(), index_manifest)

    other = Path(shutil.copytree(saved, root / "catalogue"))
    catalogue = other / manifest["catalogue"]["name"]

    def index_catalogue(data: bytes) -> None:
        """Of somebody who computes checksums, too."""
        catalogue.write_bytes(data)
        rows = sum(line.startswith(b'{"id"') for line in data.splitlines())
        files = {"catalogue": manifest["catalogue"] | {"size": len(data), "crc32": zlib.crc32(data)}}
        for kind, each in (("targets", 2 * 4 * 4), ("images", 3 * 5 * 2)):
            content = bytes(rows * each)
            (other / manifest[kind]["name"]).write_bytes(content)
            files[kind] = manifest[kind] | {"size": len(content), "crc32": zlib.crc32(content)}
        (other / "manifest.json").write_text(json.dumps(manifest | files | {"rows": rows}))
        found = GalleryIndex.load(other, verify=True)
        use(found)
        found.update_metadata({id: {"n": 2} for id in found.ids[:1]})
        found.save(root / "copy", overwrite=True)

    yield "index catalogue", (catalogue.read_bytes(), index_catalogue)


def _of_a_bundle(root: Path) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    bundle = build_tiny_bundle(root / "bundle")

    def bundle_manifest(data: bytes) -> None:
        (bundle / "manifest.json").write_bytes(data)
        found = Bundle.load(bundle)
        (found.model_hash, found.sizes, found.vocabulary.hash, found.vocabulary.named_in("a red dress, longer"))
        [found.manifest.graph_hash(graph) for graph in found.manifest.graphs]

    yield "bundle manifest", ((bundle / "manifest.json").read_bytes(), bundle_manifest)

    heads = build_tiny_heads(root / "heads")

    def heads_manifest(data: bytes) -> None:
        (heads / "heads.json").write_bytes(data)
        load_heads(heads)

    yield "heads", ((heads / "heads.json").read_bytes(), heads_manifest)

    engines = root / "engines"
    engines.mkdir()
    (engines / "vision_encoder.engine").write_bytes(b"plan")
    entry = EngineEntry(
        graph="vision_encoder", graph_hash="0" * 32, build_seconds=1, layers=1, layer_types={"MatMul": 2}, device_memory=1,
        file=FileEntry(path="vision_encoder.engine", size=4, sha256="0" * 64), graph_shapes=({"batch": 1},), tolerance=TOLERANCE,
        parity=GraphParity(graph="vision_encoder", outputs={}, shapes=()),
    )  # fmt: skip
    profile = msgspec.convert({"batch": {"min": 1, "opt": 1, "max": 2}, "text_length": {"min": 3, "opt": 8, "max": 16}}, Profile)
    sidecar = EngineManifest(
        precision="float32", gpu="GPU", compute_capability="9.0", tensorrt="10.16.1", cuda_driver="13.0", hardware_compatible=True,
        version_compatible=True, tf32=False, optimization_level=3, workspace=None, profiles=(profile,), engines=(entry,),
    )  # fmt: skip

    def engines_json(data: bytes) -> None:
        (engines / "engines.json").write_bytes(data)
        found = read_sidecar(engines)
        found.refusal(gpu="GPU", compute_capability="9.0", tensorrt="10.17.0.post1", graph="vision_encoder", graph_hash="0" * 32)
        for each in found.engines:
            read_plan(engines, each)

    yield "engines.json", (to_json(sidecar), engines_json)

    def vocabulary(data: bytes) -> None:
        found = parse_json(AttributeVocabulary, data, where="vocabulary.json")
        (found.hash, found.named_in("a longer, red v-neck dress with 3/4 sleeves"))

    yield "vocabulary", (to_json(PAPER_VOCABULARY), vocabulary)
    yield "zones", (to_json(ZoneSpec(lo=0.1, hi=0.5)), lambda data: parse_json(ZoneSpec, data, where="zones.json"))

    spec, tokenizer = TokenizerSpec(max_length=16), root / "tokenizer.json"
    yield (
        "tokenizer spec",
        (to_json(spec), lambda data: TextEncoder(bundle / "tokenizer.json", parse_json(TokenizerSpec, data, where="spec"))),
    )

    def tokenizer_file(data: bytes) -> None:
        tokenizer.write_bytes(data)
        TextEncoder(tokenizer, spec).encode(["the same in red", "ROUND with\nlong"])

    yield "tokenizer.json", (build_tokenizer().to_str().encode(), tokenizer_file)


def _of_calls(root: Path, index: GalleryIndex) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    filter = {
        "s": "a", "n": {">=": 0, "<": 9, "!=": 3}, "z": {"exists": True}, "tags": {"contains": "x"},
        "or": [{"s": {"in": ["a", 1, None, 1.5, True]}}, {"not": [{"b": True}, {"and": [{"n": 1}]}]}],
    }  # fmt: skip

    def filters(data: bytes) -> None:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return
        index.count(found)
        index.search(query_rows(2), 3, filter=found)

    yield "filters", (json.dumps(filter).encode(), filters)

    def ids(data: bytes) -> None:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return
        fresh = GalleryIndex(model_hash="m", target_shape=(2, 4), image_shape=(3, 5))
        calls: list[Callable[[], object]] = [
            lambda: index.get(found["ids"]),
            lambda: index.search(query_rows(1), found["k"], exclude=found["exclude"], picks=found["picks"]),
            lambda: fresh.add(found["ids"], target_rows(len(found["ids"])), metadata=found["metadata"]),
            lambda: fresh.update_metadata(found["by_id"]),
            lambda: fresh.save(root / "ids", overwrite=True),
            lambda: fresh.remove(found["ids"]),
        ]
        if not isinstance(found, dict) or not set(given) <= set(found) or not isinstance(found["ids"], list):
            return
        for call in calls:
            try:
                call()
            except DQEError as error:
                check_line(error)

    given = {"ids": ["a", "b/c", "ü"], "metadata": [{"n": 1, "t": ["x"]}, None, {"d": {"e": None}}], "exclude": [["a"]], "k": 3, "picks": 0,
             "by_id": {"a": {"n": 2}, "b/c": None}}  # fmt: skip
    yield "ids and metadata", (json.dumps(given).encode(), ids)


def _of_metadata(root: Path) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    described = root / "metadata"
    lines = [{"id": "a", "n": 1, "tags": ["x"], "d": {"e": None}}, {"id": "b/c.jpg", "n": 1.5, "s": "ü"}, {"id": "c", "b": True}]
    table = 'id,price,brand,sale\r\na.jpg,12,"x, y",true\r\nb.jpg,1.5e3,,false\r\n\r\n"c\nd",,z,\r\n'

    def metadata_file(data: bytes) -> None:
        described.write_bytes(data)
        read_metadata(described)

    yield "metadata lines", (b"\n".join(json.dumps(line).encode() for line in lines), metadata_file)
    yield "metadata table", (table.encode(), metadata_file)


def _of_queries(root: Path) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    engine = RetrievalEngine.load(build_tiny_bundle(root / "engine"), provider="cpu", threads=1)
    engine.index_images({f"i{n}": noise_image(n) for n in range(4)}, metadata={f"i{n}": {"n": n} for n in range(4)})
    asked = {
        "text": "the same in red", "reference_id": "i1", "weights": {"colour": 2.0}, "absolute_weights": {"shape": 1.0}, "unlike": ["i2"],
        "filter": {"n": {">=": 0}}, "exclude": ["i3"], "exclude_reference": True, "k": 3, "offset": 0, "minimum_score": -2.0, "zones": True,
        "explain": True,
    }  # fmt: skip

    def query(data: bytes) -> None:
        """As a server would make it of a request."""
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(found, dict) and set(found) <= set(asked):
            engine.search(Query(**found))

    yield "query", (json.dumps(asked).encode(), query)


def _of_profiles(root: Path) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    traffic = root / "traffic.jsonl"

    def traffic_file(data: bytes) -> None:
        traffic.write_bytes(data)
        traffic_profile(traffic, 16)

    yield "traffic", (b"\n".join(b'{"batch": %d, "text_length": %d}' % (n, 3 + n) for n in range(1, 9)), traffic_file)


def _of_mining(root: Path) -> Iterator[tuple[str, tuple[bytes, Parser]]]:
    mined = root / "mined"
    mine_to_folder(mined, job())

    def mined_json(data: bytes) -> None:
        (mined / "mined.json").write_bytes(data)
        read_mined(mined)

    yield "mined.json", ((mined / "mined.json").read_bytes(), mined_json)

    array = (mined / "picks.npy").read_bytes()
    document = json.loads((mined / "mined.json").read_bytes())

    def mined_array(data: bytes) -> None:
        (mined / "picks.npy").write_bytes(data)
        for each in document["files"]:
            if each["path"] == "picks.npy":
                each |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (mined / "mined.json").write_text(json.dumps(document))
        read_mined(mined)

    yield "mined picks.npy", (array, mined_array)

    run = {key: document[key] for key in ("schema_version", "plan", "resolved")} | {"kind": "mining-run"}

    def run_json(data: bytes) -> None:
        partial = root / "run.partial"
        partial.mkdir(exist_ok=True)
        (partial / "run.json").write_bytes(data)
        mine_to_folder(root / "run", job(), force=False)
        shutil.rmtree(root / "run")

    yield "run.json", (json.dumps(run).encode(), run_json)
