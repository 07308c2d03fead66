"""`dqe-export --push`, by the hub's real client against a fake hub: what is sent, what is left alone, what the card says."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from support.fake_hub import READER, WRITER, FakeHub, Repository, running_hub, use_hub
from support.refused import refused as refused_as
from support.samples import noise_image
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.bundle import Bundle
from dqe_engine.cli import index, search, serve
from dqe_engine.contracts.manifest import BundleManifest, GraphParity, OutputParity, RetrievalParity
from dqe_engine.contracts.provenance import Provenance, SourceFile
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, BundleError, InputError
from dqe_export.cli.export import main
from dqe_export.hub import push_bundle
from dqe_export.model_card import _QUERIES, GENERATED, model_card
from dqe_training.cli import evaluate
from dqe_training.config import BaseQuery

NAME = "me/tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as found:
        use_hub(monkeypatch, found, tmp_path / "cache", WRITER)
        yield found


refused = partial(refused_as, kind=BundleError)


def test_one_commit_that_loads_and_none_for_equal_content(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    first = push_bundle(tiny, NAME)
    repository = hub.repositories[NAME]
    assert (len(repository.commits), repository.head) == (2, first.commit)  # the hub's own, and ours
    names = {entry.path for entry in Bundle.load(tiny).manifest.files} | {"manifest.json", "README.md"}
    assert set(first.files) == names
    assert set(repository.files) == names | {".gitattributes"}
    assert all(repository.files[name] == (tiny / name).read_bytes() for name in names - {"README.md"})
    engine = RetrievalEngine.load(f"hf://{NAME}", provider="cpu", threads=1)
    assert engine.bundle.manifest == Bundle.load(tiny).manifest
    hub.requests.clear()
    for path in (tiny, engine.bundle.path):  # what was downloaded may be published, too
        again = push_bundle(path, NAME)
        assert (again.commit, again.files) == (first.commit, ())
        assert "nothing to do" in again.describe()
    assert len(repository.commits) == 2
    assert not [request for request in hub.requests if "/commit/" in request or "/preupload/" in request or "/large/" in request]


def test_only_what_differs_is_sent_and_what_is_no_longer_named_goes(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    push_bundle(tiny, NAME)
    hub.repositories[NAME].commit({"photo.png": b"mine", "vision_encoder.onnx.data": b"of an earlier bundle"})
    bare = build_tiny_bundle(tmp_path / "bare", attributes=False)
    hub.requests.clear()
    pushed = push_bundle(bare, NAME)
    assert set(pushed.files) == {"manifest.json", "README.md", "attribute_heads.onnx", "vision_encoder.onnx.data"}
    files = hub.repositories[NAME].files
    assert files["photo.png"] == b"mine"
    assert not {"attribute_heads.onnx", "vision_encoder.onnx.data"} & set(files)
    assert not [request for request in hub.requests if request.startswith("PUT")]
    assert Bundle.load(f"hf://{NAME}").sizes.attributes == 0


def test_a_card_of_somebody_elses_is_left_alone(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    push_bundle(tiny, NAME)
    ours = hub.repositories[NAME].files["README.md"].decode()
    hub.repositories[NAME].commit({"README.md": ours.replace(GENERATED, "My own words.").encode()})
    other = build_tiny_bundle(tmp_path / "other", seed=1)
    pushed = push_bundle(other, NAME)
    assert pushed.card_kept
    assert "README.md is not ours and stays" in pushed.describe()
    assert b"My own words." in hub.repositories[NAME].files["README.md"]
    hub.repositories[NAME].commit({"README.md": ours.encode() + b"stale"})
    assert push_bundle(other, NAME).files == ("README.md",)
    assert hub.repositories[NAME].files["README.md"].decode() == model_card(Bundle.load(other).manifest, NAME)


def test_a_bundle_that_does_not_verify_is_not_pushed(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    data = bytearray((broken / "tokenizer.json").read_bytes())
    data[9] ^= 1
    (broken / "tokenizer.json").write_bytes(data)
    refused(lambda: push_bundle(broken, NAME), "tokenizer.json: its bytes changed")
    refused(lambda: push_bundle(tmp_path, NAME), "no bundle here")
    assert not hub.repositories
    assert not hub.requests


def test_private_and_rights(hub: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_bundle(tiny, NAME, private=True)
    assert hub.repositories[NAME].private
    assert push_bundle(tiny, NAME).files == ()
    hub.repositories["me/open"] = Repository()
    hub.repositories["me/open"].commit({"README.md": b""})
    refused(lambda: push_bundle(tiny, "me/open", private=True), "--private: me/open exists and is public", kind=InputError)
    monkeypatch.setenv("HF_TOKEN", READER)
    refused(lambda: push_bundle(tiny, "me/new"), "--push me/new: the hub does not allow this change", "get a token that may")
    refused(lambda: push_bundle(tiny, "me/open"), "--push me/open: the hub does not allow this change")
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: push_bundle(tiny, NAME), "not logged in to the hub; log in with a token that may write: hf auth login, or HF_TOKEN")
    refused(lambda: push_bundle(tiny, "tiny"), "expected OWNER/NAME", kind=InputError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: push_bundle(tiny, NAME), "pip install 'dqe-engine[hub]'", kind=BackendError)


def test_a_change_by_somebody_else_meanwhile(hub: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({"README.md": b"first"})
    write = model_card

    def slowly(manifest: BundleManifest, name: str) -> str:
        hub.repositories[NAME].commit({"README.md": b"theirs"})
        return write(manifest, name)

    monkeypatch.setattr("dqe_export.hub.model_card", slowly)
    refused(lambda: push_bundle(tiny, NAME), "changed by somebody else meanwhile", "run the same command again")
    assert hub.repositories[NAME].files == {"README.md": b"theirs"}


def test_the_command(hub: FakeHub, tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--push", NAME, "--bundle", str(tiny), "--private"]) == 0
    commit = hub.repositories[NAME].head
    assert capsys.readouterr().out == f"hf://{NAME}@{commit}  7 files\n"
    for arguments, said in (
        (["--private", "--bundle", str(tiny)], "--private goes with --push OWNER/NAME"),
        (["--push", "tiny", "--bundle", str(tiny)], "expected OWNER/NAME"),
        (["--push", NAME], "expected a checkpoint and a bundle to write"),
        (["--push", NAME, "--bundle", str(tiny), "--precision", "f16"], "publishes it as it is"),
        (["--push", NAME, "--bundle", str(tiny), "--tf32"], "--tf32 goes with --trt"),
        (["checkpoint", "--push", NAME, "--bundle", str(tiny)], "publishes it as it is"),
        (["checkpoint", "--push", NAME, "--bundle", str(tiny), "--heads-only"], "dqe-export --push me/tiny --bundle BUNDLE"),
        (["--push", NAME, "--bundle", str(tmp_path)], "no bundle here"),
        (["--trt", "--bundle", f"hf://{NAME}"], "a bundle in the hub's cache must not be changed"),
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: ")
        assert said in told
    assert hub.repositories[NAME].head == commit


def test_an_export_is_pushed_when_it_is_done(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name or a token that is wrong is told before the export."""
    exported: list[Path] = []

    def export(args: argparse.Namespace) -> int:
        exported.append(build_tiny_bundle(args.out))
        return 0

    monkeypatch.setattr("dqe_export.cli.export._export", export)
    assert main(["checkpoint", str(tmp_path / "out"), "--push", "me"]) == 2
    monkeypatch.delenv("HF_TOKEN")
    assert main(["checkpoint", str(tmp_path / "out"), "--push", NAME]) == 2
    assert not exported
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert main(["checkpoint", str(tmp_path / "out"), "--push", NAME]) == 0
    assert exported == [tmp_path / "out"]
    assert Bundle.load(f"hf://{NAME}").model_hash == Bundle.load(tmp_path / "out").model_hash


def test_the_pages_commands_run(
    hub: FakeHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "bundle")
    Path("photos").mkdir()
    for n in range(3):
        noise_image(n).save(f"photos/{n}.jpg")
    noise_image(1).save("photo.jpg")
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for line in lines.splitlines()]
    assert [command[0] for command in commands] == ["dqe-export", "dqe-index", "dqe-search", "dqe-serve"]
    for name, *arguments in commands[:3]:
        assert {"dqe-export": main, "dqe-index": index.main, "dqe-search": search.main}[name](arguments) == 0
    assert "1.jpg" in capsys.readouterr().out
    served, places, _ = serve._places(serve.build_parser().parse_args(commands[3][1:]))
    assert (served, places) == (Bundle.load("hf://OWNER/NAME").path, tmp_path / "index")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/hub.md", "exec"), {})
    assert "hf://OWNER/NAME@" in capsys.readouterr().out


def test_an_evaluation_takes_a_name_on_the_hub(hub: FakeHub, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push_bundle(tiny, NAME)
    for model, options, said in (
        ("me/none", [], "give either --data DIR"),
        ("me/none", ["--data", "d"], "no such repository"),
        (NAME, ["--data", "no-such-data"], "no-such-data"),
    ):
        assert evaluate.main([f"hf://{model}", *options]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_card_knows_every_base_query() -> None:
    assert set(_QUERIES) == set(get_args(BaseQuery))


def test_the_card_says_what_the_manifest_says(tiny: Path) -> None:
    manifest = Bundle.load(tiny).manifest
    output = OutputParity(max_error=0.0123, mean_error=0.0, cosine_min=0.99876, cosine_p1=1.0, cosine_mean=1.0)
    source = SourceFile(name="sprc|cirr.pt", size=77, sha256="f" * 64)
    full = msgspec.structs.replace(
        manifest,
        name="Shoes <b>",
        model={"vision": {"layers": 39, "hidden_size": 1408}, "qformer": {"layers": 12, "hidden_size": 768}, "base_query": "two_pass"},
        precision="int8",
        parity=(GraphParity(graph="query_encoder", outputs={"base_query": output}, shapes=()),),
        imported=Provenance(format="sprc", files=(source,), licence="none named; ask the authors", deviations=("reads EXIF",)),
        retrieval=RetrievalParity(
            data="cirr", queries=418, gallery=2297, pytorch_recall_at_10=0.52, bundle_recall_at_10=0.515, difference=-0.5,
            interval=(-1.25, 0.25), allowed=1.0, top10_overlap=0.97,
        ),
    )  # fmt: skip
    card = model_card(full, NAME)
    for part in (
        "library_name: dqe-engine",
        GENERATED,
        "# Shoes &lt;b>\n",
        f'RetrievalEngine.load("hf://{NAME}")',
        "ViT of 39 layers and width 1408",
        "second pass over the fused query tokens",
        "`sprc\\|cirr.pt`, 77 bytes, SHA-256 `" + "f" * 64,
        "Licence of these weights: none named",
        "Otherwise than in the original: reads EXIF",
        "| colour | red, blue |",
        "int8, graphs for CPUs",
        "| query_encoder | 1.2e-02 | 0.998760 |",
        "On cirr, 418 queries over 2297 images: recall@10 51.50 %, -0.50 points",
        "-1.25 to +0.25",
        "97.0 % of the first ten",
        "## Intended use",
    ):
        assert part in card, part
    assert card == model_card(full, NAME)
    bare = model_card(msgspec.structs.replace(manifest, vocabulary=AttributeVocabulary(attributes=())), NAME)
    assert "no attribute heads" in bare
    assert "no recall is known of it" in bare
    assert "trained with dqe-train" in bare
    code = re.search(r"```python\n(.*?)```", bare, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) == 3
    compile(code[1], "card", "exec")
