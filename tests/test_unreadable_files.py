"""Every file that a command reads, damaged in every way: one line that says so, exit code 2, no traceback."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support import command_workspace
from support.command_workspace import (
    ABLATE,
    BACKBONE,
    CHECKED,
    ENCODE,
    EVAL,
    EVAL_BUNDLE,
    EVAL_OWN,
    EVAL_PUBLIC,
    EXPORT,
    FEATURES,
    IMPORT,
    IMPORT_TOWER,
    INDEX,
    MINE,
    OWN,
    PRETRAIN,
    SEARCH,
    START,
    SUBMISSION,
    TOWER,
    TRAIN,
    Main,
    check_line,
    expanded,
    pipe_at,
)
from support.permissions import enforced_permissions

from dqe_engine.cli import heads, index, mine, search
from dqe_engine.doctor import bundle_graphs
from dqe_engine.doctor.findings import Context, Finding
from dqe_export.cli import demo, export, reproduce
from dqe_training.cli import ablate, data, evaluate, import_, pretrain, train

workspace = command_workspace.workspace
ABSENT = ("missing", "dangling")
TEXT = {".json", ".jsonl", ".yaml"}
REPRODUCE = "fashioniq --weights model --images fashioniq/images --annotations fashioniq --check"
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
    (import_.main, IMPORT, "published.pth", ()),
    (import_.main, IMPORT, "vocab.txt", ("deep",)),
    (import_.main, IMPORT_TOWER, "qformer.pth tower.pth", ()),
    (pretrain.main, PRETRAIN, "garments/images.jsonl garments/vocabulary.json garments/images/train/000003.jpg config.yaml", ()),
    (data.main, "check fashioniq", CHECKED, (*ABSENT, "directory", "pipe")),
    (data.main, f"check-submission {SUBMISSION} --data cirr", f"{SUBMISSION} cirr/captions/cap.rc2.test1.json", ()),
    (data.main, "tinted OUT --sprite sprite.png", "sprite.png", ()),
    (data.main, ENCODE, "model/model.safetensors garments/train.jsonl garments/images/train/000001.jpg", ()),
    (data.main, f"{FEATURES} OUT", "model/checkpoint.json", ()),
    (data.main, f"{FEATURES} OUT", "images/00.png", ("missing", "directory")),
    (data.main, f"{FEATURES} features", "features/*/features.json", ABSENT),
    (data.main, f"{FEATURES} features", "features/*/shard-00000/shard.json", ()),
    (ablate.main, ABLATE, "garments/train.jsonl garments/val.jsonl garments/vocabulary.json garments/images/train/000001.jpg", ()),
    (export.main, EXPORT, "model/checkpoint.json model/model.safetensors model/tokenizer.json garments/val.jsonl", ()),
    (reproduce.main, REPRODUCE, "fashioniq/captions/cap.dress.val.json fashioniq/image_splits/split.dress.val.json", ()),
    (reproduce.main, REPRODUCE, "model/checkpoint.json model/vocabulary.json", ()),
    (export.main, "--trt --dry-run --bundle bundle --traffic traffic.jsonl", "traffic.jsonl bundle/manifest.json", ()),
)
"""Commands, their arguments and the files that they read. Last come the kinds of damage that are none there: where a file may be
missing, say. Paths are relative to the workspace; OUT is a new folder."""
KINDS = ("missing", "dangling", "directory", "pipe", "denied", "empty", "cut", "garbage", "utf-16", "deep")


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """`path` in the state that `kind` names while the block runs."""
    backup = path.with_name(f"{path.name}.kept")
    content = path.read_bytes()
    os.rename(path, backup)
    try:
        if kind == "directory":
            path.mkdir()
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind not in ("missing", "pipe"):
            text = content.decode("latin-1")
            path.write_bytes({
                "denied": content, "empty": b"", "cut": content[: len(content) * 2 // 5], "utf-16": text.encode("utf-16"),
                "deep": b"[" * 100_000, "garbage": np.random.default_rng(0).bytes(len(content) // 2),
            }[kind])  # fmt: skip
        if kind == "denied":
            path.chmod(0)
            with enforced_permissions():
                yield
        elif kind == "pipe":
            with pipe_at(path):
                yield
        else:
            yield
    finally:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        os.rename(backup, path)


MATRIX = [
    pytest.param(main, arguments, file, kind, id=f"{main.__module__.rpartition('.')[2]} {arguments.split()[0]} {file} {kind}")
    for main, arguments, files, but in READS
    for file in files.split()
    for kind in KINDS
    if kind not in but and (kind not in ("utf-16", "deep") or Path(file).suffix in TEXT)
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
    """A new command comes with the files that it reads, or the outputs that it writes. The doctor has tests of its own, below, and the
    server in tests/server."""
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    here = {f"{main.__module__}:main" for main, *_ in (*READS, *OUTPUTS)}
    assert set(project["scripts"].values()) - here == {"dqe_engine.cli.doctor:main", "dqe_engine.cli.serve:main"}


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
