"""Every file that a command reads, damaged in every way: one line that says so, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.mining_workers import problem
from support.permissions import enforced_permissions
from support.samples import noise_image
from support.tiny_benchmarks import write_cirr, write_fashioniq
from support.tiny_blip2 import write_blip2
from support.tiny_bundle import build_tiny_bundle, build_tiny_heads
from support.tiny_training import OVERRIDES, write_checkpoint, write_tiny_garments

from dqe_engine.cli import heads, index, mine, search
from dqe_engine.doctor import bundle_graphs
from dqe_engine.doctor.findings import Context, Finding
from dqe_export.cli import demo, export
from dqe_training.cli import ablate, data, evaluate, pretrain, train

Main = Callable[[Sequence[str]], int]


ABSENT = ("missing", "dangling")
TEXT = {".json", ".jsonl", ".yaml"}
INDEX = "bundle images --out index --provider cpu --threads 1"
SEARCH = "bundle index --image images/00.png --text red --provider cpu --threads 1"
EVAL = "model --data garments"
EVAL_OWN = "model --triplets own/triplets.jsonl --images own/images --image-labels own/labels.jsonl --gallery own/gallery.txt"
EVAL_PUBLIC = "model --data fashioniq"
EVAL_BUNDLE = "bundle --data garments"
TRAIN = "--data garments --out OUT OVERRIDES"
OWN = (
    "--triplets own/triplets.jsonl --images own/images --image-labels own/labels.jsonl --vocabulary own/vocabulary.json --out OUT OVERRIDES"
)
START = "--triplets own/triplets.jsonl --images own/images --out OUT start=model finetune=attributes"
BACKBONE = "--triplets own/triplets.jsonl --images own/images --out OUT backbone=blip2 optim.epochs=1"
TOWER = "--data garments --out OUT OVERRIDES vision_weights=tower optim.vision_learning_rate=0"
MINE = "mining --out OUT"
ENCODE = "encode model --data garments --out OUT"
FEATURES = "features --model model --images images --out"
CHECKED = "fashioniq/captions/cap.dress.val.json fashioniq/image_splits/split.dress.val.json"
SUBMISSION = "submission/cirr-test1-recall.json"
PRETRAIN = "garments --out OUT --config config.yaml"
ABLATE = "--data garments --out OUT --seeds 1 --variants baseline,+kl OVERRIDES"
EXPORT = "model OUT --data garments"
READS: tuple[tuple[Main, str, str, tuple[str, ...]], ...] = (
    (index.main, INDEX, "bundle/manifest.json bundle/vision_encoder.onnx bundle/tokenizer.json", ()),
    (index.main, INDEX, "index/manifest.json", ABSENT),
    (index.main, INDEX, "index/*.catalogue index/*.targets index/*.images", ()),
    (index.main, "bundle images --out OUT", "images/00.png", (*ABSENT, "directory")),
    (search.main, SEARCH, "bundle/manifest.json bundle/query_encoder.onnx bundle/tokenizer.json", ()),
    (search.main, SEARCH, "index/manifest.json index/*.catalogue index/*.targets images/00.png", ()),
    (heads.main, "bundle heads", "bundle/manifest.json heads/heads.json heads/attribute_heads.onnx", ()),
    (mine.main, MINE, "mining/queries.npy mining/gallery.npy mining/targets.npy", ()),
    (mine.main, MINE, "mining/exclude.npy", ABSENT),
    (mine.main, "--show mined", "mined/mined.json mined/picks.npy mined/counts.npy", ()),
    (train.main, TRAIN, "garments/train.jsonl garments/images.jsonl garments/vocabulary.json garments/images/train/000001.jpg", ()),
    (train.main, OWN, "own/triplets.jsonl own/labels.jsonl own/vocabulary.json own/images/000001.jpg", ()),
    (train.main, f"{TRAIN} --config config.yaml", "config.yaml", ()),
    (train.main, START, "model/checkpoint.json model/model.safetensors model/tokenizer.json model/vocabulary.json", ()),
    (train.main, BACKBONE, "blip2/config.json blip2/model.safetensors", ()),
    (train.main, BACKBONE, "blip2/tokenizer.json", ("utf-16",)),
    (train.main, TOWER, "tower/vision.safetensors tower/vision.json", ()),
    (evaluate.main, EVAL, "model/checkpoint.json model/model.safetensors model/tokenizer.json model/vocabulary.json", ()),
    (evaluate.main, EVAL, "garments/val.jsonl garments/images.jsonl garments/images/gallery/000002.jpg", ()),
    (evaluate.main, EVAL_BUNDLE, "bundle/manifest.json bundle/target_encoder.onnx garments/images/gallery/000002.jpg", ()),
    (evaluate.main, EVAL_OWN, "own/triplets.jsonl own/labels.jsonl own/gallery.txt own/images/000001.jpg", ()),
    (evaluate.main, EVAL_PUBLIC, "fashioniq/captions/cap.dress.val.json fashioniq/image_splits/split.dress.val.json", ()),
    (evaluate.main, EVAL_PUBLIC, "fashioniq/images/dress/Dva000.png", ()),
    (pretrain.main, PRETRAIN, "garments/images.jsonl garments/vocabulary.json garments/images/train/000003.jpg config.yaml", ()),
    (data.main, "check fashioniq", CHECKED, (*ABSENT, "directory")),
    (data.main, f"check-submission {SUBMISSION} --data cirr", f"{SUBMISSION} cirr/captions/cap.rc2.test1.json", ()),
    (data.main, "tinted OUT --sprite sprite.png", "sprite.png", ()),
    (data.main, ENCODE, "model/model.safetensors garments/train.jsonl garments/images/train/000001.jpg", ()),
    (data.main, f"{FEATURES} OUT", "model/checkpoint.json", ()),
    (data.main, f"{FEATURES} OUT", "images/00.png", ("missing", "directory")),
    (data.main, f"{FEATURES} features", "features/*/features.json", ABSENT),
    (data.main, f"{FEATURES} features", "features/*/shard-00000/shard.json", ()),
    (ablate.main, ABLATE, "garments/train.jsonl garments/val.jsonl garments/vocabulary.json garments/images/train/000001.jpg", ()),
    (export.main, EXPORT, "model/checkpoint.json model/model.safetensors model/tokenizer.json garments/val.jsonl", ()),
    (export.main, "--trt --dry-run --bundle bundle --traffic traffic.jsonl", "traffic.jsonl bundle/manifest.json", ()),
)
"""Commands, their arguments and the files that they read. Last come the kinds of damage that are none there: where a file may be
missing, say. Paths are relative to the workspace; OUT is a new folder."""
KINDS = ("missing", "dangling", "directory", "pipe", "denied", "empty", "cut", "garbage", "utf-16", "deep")
SERVING = (index.main, search.main, heads.main, mine.main)
"""Commands for which a pipe in the place of a file is an error too: what is uploaded or mounted is not under their user's control. Those
that train and export wait for whoever writes to it."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("workspace")
    (root / "images").mkdir()
    for seed in range(3):
        noise_image(seed).save(root / "images" / f"{seed:02}.png")
    build_tiny_bundle(root / "bundle")
    build_tiny_heads(root / "heads")
    write_tiny_garments(root / "garments")
    write_checkpoint(root / "model")
    write_blip2(root / "blip2", shard_size="10MB")
    write_fashioniq(root / "fashioniq")
    write_cirr(root / "cirr")
    (root / "own").mkdir()
    shutil.copytree(root / "garments" / "images" / "train", root / "own" / "images")
    names = sorted(path.name for path in (root / "own" / "images").iterdir())
    lines = [{"reference": a, "target": b, "text": "is red"} for a, b in pairwise(names[:12])]
    (root / "own" / "triplets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "own" / "labels.jsonl").write_text("".join(json.dumps({"image": n, "attributes": {"colour": "red"}}) + "\n" for n in names))
    (root / "own" / "gallery.txt").write_text("\n".join(names))
    (root / "own" / "vocabulary.json").write_text('{"attributes": [{"name": "colour", "values": ["red"]}]}')
    (root / "config.yaml").write_text("model: {preprocessing: {image_size: 16}, vision: {hidden_size: 16, layers: 1, heads: 2}}")
    (root / "traffic.jsonl").write_text('{"batch": 4, "text_length": 11}\n' * 9)
    Image.new("L", (840, 840)).save(root / "sprite.png")
    (root / "mining").mkdir()
    for name, array in zip(("queries", "gallery", "targets", "exclude"), problem().values(), strict=True):
        np.save(root / "mining" / f"{name}.npy", array)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert index.main(INDEX.split()) == 0
        assert mine.main(["mining", "--out", "mined"]) == 0
        assert pretrain.main(["garments", "--out", "tower", "--config", "config.yaml", "--epochs", "1"]) == 0
        assert data.main(["features", "--model", "model", "--images", "images", "--out", "features"]) == 0
        assert evaluate.main(["model", "--data", "cirr", "--split", "test1", "--submission", "submission"]) == 0
        yield root
        torch.set_num_threads(threads)


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """`path` in the state that `kind` names while the block runs."""
    backup = path.with_name(f"{path.name}.kept")
    content = path.read_bytes()
    os.rename(path, backup)
    try:
        if kind == "directory":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind != "missing":
            text = content.decode("latin-1")
            path.write_bytes({
                "denied": content, "empty": b"", "cut": content[: len(content) * 2 // 5], "utf-16": text.encode("utf-16"),
                "deep": b"[" * 100_000, "garbage": np.random.default_rng(0).bytes(len(content) // 2),
            }[kind])  # fmt: skip
        if kind == "denied":
            path.chmod(0)
            with enforced_permissions():
                yield
        else:
            yield
    finally:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        os.rename(backup, path)


def expanded(arguments: str, out: Path) -> list[str]:
    return arguments.replace("OVERRIDES", " ".join(OVERRIDES)).replace("OUT", str(out)).split()


def check_line(code: int, said: str, part: str) -> None:
    """One `error:` line at the end, which holds `part`; where that is about permissions, another file is no remedy."""
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said.splitlines()[-1] == errors[0]
    assert part in errors[0]
    if "ermission" in part:
        for remedy in ("index again", "copy it again", "export again", "damaged", "truncated"):
            assert remedy not in errors[0]


MATRIX = [
    pytest.param(main, arguments, file, kind, id=f"{main.__module__.rpartition('.')[2]} {arguments.split()[0]} {file} {kind}")
    for main, arguments, files, but in READS
    for file in files.split()
    for kind in KINDS
    if kind not in but and (kind not in ("utf-16", "deep") or Path(file).suffix in TEXT) and (kind != "pipe" or main in SERVING)
]


@pytest.mark.parametrize(("main", "arguments", "file", "kind"), MATRIX)
def test_one_line(
    main: Main, arguments: str, file: str, kind: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = (found.relative_to(workspace) for found in workspace.glob(file))
    with damaged(path, kind):
        code = main(expanded(arguments, tmp_path / "out"))
    check_line(code, said := capsys.readouterr().err, "permission denied; grant this user access" if kind == "denied" else "")
    assert kind != "denied" or path.name in said.splitlines()[-1]


def test_every_command_is_here() -> None:
    """A new command comes with the files that it reads, or the outputs that it writes. The doctor has tests of its own, below."""
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    here = {f"{main.__module__}:main" for main, *_ in (*READS, *OUTPUTS)}
    assert set(project["scripts"].values()) - here == {"dqe_engine.cli.doctor:main"}


FOLDERS = (
    (index.main, INDEX, "bundle"), (index.main, INDEX, "images"), (index.main, INDEX, "index"), (search.main, SEARCH, "index"),
    (heads.main, "bundle heads", "heads"), (mine.main, MINE, "mining"), (mine.main, "--show mined", "mined"),
    (train.main, TRAIN, "garments"), (train.main, TRAIN, "garments/images"), (train.main, OWN, "own/images"), (train.main, START, "model"),
    (train.main, BACKBONE, "blip2"), (train.main, TOWER, "tower"), (evaluate.main, EVAL, "model"), (evaluate.main, EVAL, "garments"),
    (evaluate.main, EVAL_BUNDLE, "bundle"), (evaluate.main, EVAL_OWN, "own/images"), (evaluate.main, EVAL_PUBLIC, "fashioniq/images"),
    (evaluate.main, EVAL_PUBLIC, "fashioniq"), (data.main, "check fashioniq", "fashioniq"),
    (data.main, "check fashioniq", "fashioniq/images"), (pretrain.main, PRETRAIN, "garments"),
    (data.main, f"{FEATURES} features", "features"),
    (data.main, f"{FEATURES} OUT", "images"), (ablate.main, ABLATE, "garments"),
    (export.main, EXPORT, "model"),
)  # fmt: skip


@pytest.mark.parametrize(("main", "arguments", "folder"), FOLDERS, ids=[f"{c[0].__module__} {c[2]}" for c in FOLDERS])
def test_a_folder_that_may_not_be_entered(
    main: Main, arguments: str, folder: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mode = (workspace / folder).stat().st_mode
    (workspace / folder).chmod(0)
    try:
        with enforced_permissions():
            code = main(expanded(arguments, tmp_path / "out"))
    finally:
        (workspace / folder).chmod(mode)
    check_line(code, capsys.readouterr().err, "ermission")


OUTPUTS = (
    (index.main, "bundle images --out OUT"), (mine.main, MINE), (train.main, TRAIN), (pretrain.main, PRETRAIN), (data.main, "garments OUT"),
    (data.main, "tinted OUT --sprite sprite.png"), (data.main, ENCODE),
    (data.main, f"{FEATURES} OUT"), (data.main, "check fashioniq --missing-list OUT"),
    (evaluate.main, "model --data cirr --split test1 --submission OUT"), (ablate.main, ABLATE), (export.main, "model OUT"),
    (demo.main, "--out OUT"),
)  # fmt: skip


@pytest.mark.parametrize("place", ["denied", "below a file", "file"])
@pytest.mark.parametrize(("main", "arguments"), OUTPUTS, ids=[f"{c[0].__module__} {c[1]}" for c in OUTPUTS])
def test_an_output_that_cannot_be_written(
    main: Main, arguments: str, place: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if place == "file" and "missing-list" in arguments:
        return
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").chmod(0o555)
    out = {"denied": tmp_path / "folder" / "out", "below a file": tmp_path / "file" / "out", "file": tmp_path / "file"}[place]
    with enforced_permissions():
        code = main(expanded(arguments, out))
    check_line(code, capsys.readouterr().err, "ermission" if place == "denied" else str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


WRITTEN_BY_HAND = (
    (train.main, OWN, "own/triplets.jsonl own/labels.jsonl own/vocabulary.json"),
    (train.main, f"{TRAIN} --config config.yaml", "config.yaml"),
    (train.main, BACKBONE, "blip2/config.json blip2/tokenizer.json"),
    (evaluate.main, EVAL, "garments/val.jsonl garments/images.jsonl"),
    (evaluate.main, EVAL_OWN, "own/triplets.jsonl own/labels.jsonl own/gallery.txt"),
    (evaluate.main, EVAL_PUBLIC, CHECKED),
    (export.main, "--trt --dry-run --bundle bundle --traffic traffic.jsonl", "traffic.jsonl"),
)


@pytest.mark.parametrize(("main", "arguments", "files"), WRITTEN_BY_HAND, ids=[c[2] for c in WRITTEN_BY_HAND])
def test_a_byte_order_mark_changes_nothing(
    main: Main, arguments: str, files: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some editors write one, and so does PowerShell."""
    kept = {workspace / file: (workspace / file).read_bytes() for file in files.split()}
    try:
        for path, content in kept.items():
            path.write_bytes(b"\xef\xbb\xbf" + content)
        code = main(expanded(arguments, tmp_path / "out"))
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("file", ["manifest.json", "vision_encoder.onnx"])
def test_the_doctor_advises_no_other_bundle_where_this_one_may_not_be_read(file: str, workspace: Path) -> None:
    """In this thread: `enforced_permissions` does not bind another process."""
    with damaged(workspace / "bundle" / file, "denied"):
        (finding,) = (step for step in bundle_graphs.probe(Context(bundle="bundle")) if isinstance(step, Finding))
    assert (finding.found, finding.remedy) == (f"bundle/{file}: permission denied", "grant this user access to it, or run as its owner")
