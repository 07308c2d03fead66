"""Bundles on the Hugging Face hub, by its real client against a fake hub: what is downloaded, what is believed, and what errors say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.fake_hub import READER, WRITER, FakeHub, Repository, running_hub, settings_of, use_hub
from support.refused import refused as refused_as
from support.samples import noise_image
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.bundle import Bundle
from dqe_engine.cli import doctor, index, search
from dqe_engine.contracts.graphs import GRAPHS
from dqe_engine.doctor import bundle_graphs
from dqe_engine.doctor.findings import Context, Finding
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, BundleError, DQEError, InputError
from dqe_engine.heads import replace_heads
from dqe_engine.hub_paths import HubReference
from dqe_engine.query import Query

FILES = sorted(["manifest.json", "tokenizer.json", *(spec.file for spec in GRAPHS)])
NAME = "me/tiny"


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("other") / "tiny", seed=1)


@pytest.fixture
def hub(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the tiny bundle, beside files that no bundle names; the client's cache is `tmp_path / "cache"`."""
    with running_hub() as found:
        repository = found.repositories[NAME] = Repository()
        repository.commit(contents(bundle_path) | {"README.md": b"# tiny", "evil.pkl": b"cos\nsystem", "tensorrt/sm90/engines.json": b"{}"})
        use_hub(monkeypatch, found, tmp_path / "cache")
        yield found


def contents(bundle: Path) -> dict[str, bytes | None]:
    return {name: (bundle / name).read_bytes() for name in FILES}


refused = partial(refused_as, kind=BundleError)


def load(name: str = f"hf://{NAME}", **options: object) -> Bundle:
    return Bundle.load(name, **options)  # type: ignore[arg-type]


def test_what_the_manifest_names_is_downloaded_once_and_nothing_else(hub: FakeHub, bundle_path: Path) -> None:
    head, here = hub.repositories[NAME].head, Bundle.load(bundle_path)
    engine = RetrievalEngine.load(f"hf://{NAME}", provider="cpu", threads=1)
    assert hub.downloads() == FILES
    assert engine.bundle.origin == f"hf://{NAME}@{head}"
    assert engine.bundle.manifest == here.manifest
    assert sorted(os.listdir(engine.bundle.path)) == FILES
    assert all((engine.bundle.path / name).is_symlink() for name in FILES)
    assert f"hf://{NAME}@{head}" in repr(engine)
    assert here.origin is None
    engine.index_images({"a": noise_image(0), "b": noise_image(1)})
    assert len(engine.search(Query(reference_id="a", text="in red")).hits) == 1
    load(f"hf://{NAME}@main")
    assert hub.downloads() == []


def test_branch_tag_and_commit(hub: FakeHub, other_bundle: Path) -> None:
    repository = hub.repositories[NAME]
    first = repository.head
    second = repository.commit(contents(other_bundle))
    repository.tags["v1"] = first
    assert {load(f"hf://{NAME}@{name}").origin for name in ("v1", first)} == {f"hf://{NAME}@{first}"}
    loaded = load()
    assert loaded.origin == f"hf://{NAME}@{second}"
    assert loaded.model_hash == Bundle.load(other_bundle).model_hash != load(f"hf://{NAME}@v1").model_hash
    hub.requests.clear()
    assert load(f"hf://{NAME}@{first}").origin == f"hf://{NAME}@{first}"
    assert load(Path(f"hf://{NAME}@{first}")).origin == f"hf://{NAME}@{first}"
    assert hub.requests == [], "a commit that is here whole needs no hub"


def test_without_a_connection(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(load, "nothing of it is on this machine", "HF_HUB_OFFLINE is set; unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = load()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load().origin == first.origin
    refused(lambda: load(f"hf://{NAME}@v2"), "nothing of it is on this machine")
    (first.path / "query_encoder.onnx").unlink()
    refused(load, "query_encoder.onnx is not on this machine", "unset it")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not caplog.records
    assert load().origin == first.origin
    assert [record.message.endswith(f"took commit {first.path.name}, which is here") for record in caplog.records] == [True]
    refused(lambda: load("hf://me/other"), "the hub cannot be reached", "check the connection", "nothing of it is on this machine")


def test_what_is_missing_refused_or_out_of_order_is_told_in_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.repositories[NAME]
    refused(lambda: load(f"hf://{NAME}@v9"), f"hf://{NAME}@v9: the repository has no such branch, tag or commit; check the name after @")
    refused(lambda: load(f"hf://{NAME}@{'0' * 40}"), "no such branch, tag or commit")
    refused(lambda: load("hf://me/nothing"), "no such repository, or a private one", "log in: hf auth login, or HF_TOKEN")
    repository.private = True
    refused(load, "no such repository, or a private one", "log in")
    monkeypatch.setenv("HF_TOKEN", READER)
    refused(load, "no such repository, or a private one", "get a token that may")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused(load, "the hub does not allow reading it", "get a token that may")
    repository.private, repository.gated = False, True
    monkeypatch.setenv("HF_TOKEN", READER)
    refused(load, "gated; ask for access on its page", "get a token that may")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert load().sizes.attributes == 2
    hub.broken["/api/models"] = 503
    refused(lambda: load(f"hf://{NAME}@v1"), "the hub cannot be reached", "503", "try later")
    hub.broken = {}
    hub.repositories["me/photos"] = Repository()
    hub.repositories["me/photos"].commit({"README.md": b""})
    refused(lambda: load("hf://me/photos"), "no bundle here (manifest.json is missing)", "dqe-export --push")


@pytest.mark.parametrize(
    "name", ["hf://", "hf://tiny", "hf://me/tiny@", "hf://me/tiny@../x", "hf://me/tiny/x", "hf://me/a--b", "hf://me/tiny@a b", "hf:/me/t\n"]
)
def test_a_name_that_is_none(name: str) -> None:
    refused(lambda: HubReference.parse(name), "expected", kind=InputError)


def test_what_a_repository_claims_of_a_file_is_refused_before_it_is_downloaded(hub: FakeHub, bundle_path: Path) -> None:
    """Its size, and its SHA-256 where the hub has it."""
    good = (bundle_path / "vision_encoder.onnx").read_bytes()
    for claimed, said in ((good + b"x", "bytes, its manifest says"), (good[:-1] + b"x", "SHA-256 differs")):
        hub.claimed["vision_encoder.onnx"] = claimed
        refused(load, f"hf://{NAME}: vision_encoder.onnx", said, "published again")
    del hub.claimed["vision_encoder.onnx"]
    hub.repositories[NAME].commit({"vision_encoder.onnx": None})
    refused(load, "vision_encoder.onnx, which its manifest lists, is missing")
    assert hub.downloads() == ["manifest.json"]
    hub.claimed["manifest.json"] = bytes((64 << 20) + 1)
    refused(lambda: load(f"hf://{NAME}@main"), "at most 67108864 are read")


def test_content_that_is_not_what_the_manifest_says(hub: FakeHub, bundle_path: Path) -> None:
    """Of a small file, whose SHA-256 the hub does not have; and of one that was damaged here, with `verify=False` too."""
    tokenizer = (bundle_path / "tokenizer.json").read_bytes()
    hub.repositories[NAME].commit({"tokenizer.json": tokenizer.replace(b"red", b"rot")})
    refused(load, "tokenizer.json: its bytes changed since export (SHA-256 differs)")
    hub.repositories[NAME].commit({"tokenizer.json": tokenizer})
    blob = (load().path / "vision_encoder.onnx").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    refused(lambda: load(verify=False), "vision_encoder.onnx: its bytes changed")


def test_a_download_that_ends_early_goes_on(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut.add("query_encoder.onnx")
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
        refused(load, f"hf://{NAME}: query_encoder.onnx: the download ended early", "run the same again")
    assert "query_encoder.onnx" in hub.downloads()
    hub.cut.clear()
    assert load().sizes.attributes == 2
    assert hub.downloads() == ["query_encoder.onnx", "target_encoder.onnx", "tokenizer.json", "vision_encoder.onnx"]


@pytest.mark.parametrize("listed", ["evil.pkl", "tensorrt/sm90/engines.json", "../outside.onnx", "README.md"])
def test_a_manifest_that_names_what_no_bundle_loads(hub: FakeHub, bundle_path: Path, listed: str) -> None:
    manifest = json.loads((bundle_path / "manifest.json").read_text())
    manifest["files"].append({"path": listed, "size": 2, "sha256": "0" * 64})
    hub.repositories[NAME].commit({"manifest.json": json.dumps(manifest).encode()})
    refused(load, f"lists '{listed}', which is no file of a bundle; do not use this bundle")
    assert hub.downloads() == ["manifest.json"]


def test_engines_in_the_cache_are_never_opened(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tool may have fetched the whole repository into the same folder: engines are machine code."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(NAME))
    assert (folder / "tensorrt" / "sm90" / "engines.json").is_file()
    loaded = load()
    assert loaded.path == folder
    monkeypatch.setattr("dqe_engine.bundle.open_engine", lambda *args: pytest.fail("an engine was opened"))
    graph = loaded.manifest.graphs[0]
    assert loaded.session(graph, provider="auto", threads=1).provider == "cpu"
    refused(lambda: loaded.session(graph, provider="tensorrt"), "cp -rL", kind=InputError)
    refused(lambda: replace_heads(loaded.path, loaded.path), kind=DQEError)
    refused(loaded.require_own, f"hf://{NAME}@", "a bundle in the hub's cache must not be changed", kind=InputError)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(load, "needs huggingface_hub", "pip install 'dqe-engine[hub]'", kind=BackendError)


def test_every_command_takes_a_name_on_the_hub(
    hub: FakeHub, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = str(tmp_path / "index")
    assert index.main([f"hf://{NAME}", str(image_folder), "--out", made, "--threads", "1"]) == 0
    assert search.main([f"hf://{NAME}@main", made, "--reference", "00.png", "--text", "in red", "--json"]) == 0
    capsys.readouterr()

    def examine(bundle: str) -> dict[str, list[Finding]]:
        return {"bundle": [found for found in bundle_graphs.probe(Context(bundle=bundle)) if isinstance(found, Finding)]}

    monkeypatch.setattr("dqe_engine.doctor.examine", examine)  # without the examination of the machine, which takes seconds
    assert doctor.main([f"hf://{NAME}", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["findings"][0]
    assert (files["name"], files["facts"]["origin"]) == ("files", f"hf://{NAME}@{hub.repositories[NAME].head}")
    assert search.main([f"hf://{NAME}@v9", made, "--text", "red"]) == 2
    assert capsys.readouterr().err.count("error: hf:") == 1


def test_a_process_of_its_own_by_the_clients_own_settings(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which the client reads when it is imported."""

    def run(code: str, **settings: str) -> tuple[int, str, str]:
        environment = os.environ | settings_of(hub, tmp_path / "home") | settings
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    loading = f"import dqe_engine\nprint(dqe_engine.Bundle.load('hf://{NAME}').origin)\n"
    origin = f"hf://{NAME}@{hub.repositories[NAME].head}\n"
    assert run(loading)[:2] == (0, origin)
    assert hub.downloads() == FILES
    command = "from dqe_engine.cli.search import main; raise SystemExit(main(['hf://me/other', 'index', '--text', 'red']))"
    remedy = "HF_HUB_OFFLINE is set; unset it, and load this once with a connection"
    said = f"error: hf://me/other: nothing of it is on this machine, and {remedy}\n"
    assert run(loading + command, HF_HUB_OFFLINE="1") == (2, origin, said)
    assert hub.requests == []
