"""dqe-index from an empty folder on: interrupted and gone on with, bad images, other models; and what every command does with errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.samples import noise_image
from support.signals import interrupts_heard  # noqa: F401 (used by every test here)
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.cli import index as index_command
from dqe_engine.cli.main import run
from dqe_engine.engine import RetrievalEngine
from dqe_engine.index import GalleryIndex
from dqe_engine.indexer import Indexer


def index(bundle: Path, images: Path, out: Path, *options: str) -> int:
    return index_command.main([str(bundle), str(images), "--out", str(out), "--batch-size", "2", "--save-every", "4", *options])


def test_indexing_goes_on_where_it_stopped(
    bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    add_batch, calls = Indexer._add_batch, []

    def interrupted(self: Indexer, *args: object, **options: object) -> None:
        add_batch(self, *args, **options)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Indexer, "_add_batch", interrupted)
    assert index(bundle_path, image_folder, out) == 130
    assert "6 images are saved" in capsys.readouterr().err
    assert len(GalleryIndex.load(out, verify=True)) == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert index(bundle_path, image_folder, out) == 0
    assert (
        "6 added, 0 changed, 0 with other metadata, 6 unchanged, 2 skipped (2 not an image), 0 pruned; 12 in the index"
        in capsys.readouterr().out
    )
    assert len(calls) == 6
    assert index(bundle_path, image_folder, out) == 0
    assert (
        "0 added, 0 changed, 0 with other metadata, 12 unchanged, 2 skipped (2 not an image), 0 pruned; 12 in the index"
        in capsys.readouterr().out
    )


def test_an_ignored_interrupt_stays_ignored(
    bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_batch = Indexer._add_batch

    def interrupted(self: Indexer, *args: object, **options: object) -> None:
        add_batch(self, *args, **options)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Indexer, "_add_batch", interrupted)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    assert index(bundle_path, image_folder, tmp_path / "index") == 0
    assert "12 added" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_prune_and_new_images(bundle_path: Path, image_folder: Path, tmp_path: Path, indexed: list[str]) -> None:
    (image_folder / "00.png").unlink()
    noise_image(77).save(image_folder / "new.webp")
    out = Path(indexed[1])
    assert index(bundle_path, image_folder, out) == 0
    assert {"00.png", "new.webp"} <= set(GalleryIndex.load(out).ids)
    assert index(bundle_path, image_folder, out, "--prune") == 0
    assert "00.png" not in GalleryIndex.load(out)
    assert len(GalleryIndex.load(out)) == 12


def test_bad_images(bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image_folder / "sub" / "05.png").write_bytes(b"broken")
    out = tmp_path / "index"
    assert index(bundle_path, image_folder, out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    kept = len(GalleryIndex.load(out))
    assert 0 < kept < 11
    assert index(bundle_path, image_folder, out, "--skip-bad") == 0
    captured = capsys.readouterr()
    assert (
        f"{11 - kept} added, 0 changed, 0 with other metadata, {kept} unchanged, 3 skipped (3 not an image), 0 pruned; 11 in the index"
        in captured.out
    )
    assert "05.png: not an image" in captured.err


@pytest.mark.parametrize(("owner", "moment"), [(RetrievalEngine, "new_index"), (Indexer, "_add_batch")])
def test_the_loser_of_two_runs_is_told_what_to_do(
    owner: type,
    moment: str,
    bundle_path: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another dqe-index saves between the look for an index and the first save, or between two saves."""
    out, method = tmp_path / "index", getattr(owner, moment)

    def overtaken(self: Any, *args: object, **options: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, method)
            other = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
            if out.exists():
                other.load_index(out)
            other.index_images({f"theirs-{len(other.index)}": image_folder / "00.png"})
            other.save_index(out)
        method(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, overtaken)
        assert index(bundle_path, image_folder, out) == 2
    said = "another process wrote to this index meanwhile; when it is done, run the same command again to go on"
    assert capsys.readouterr().err == f"error: {out}: {said}\n"
    assert GalleryIndex.load(out).ids[0] == "theirs-0"
    assert index(bundle_path, image_folder, out) == 0
    assert len(GalleryIndex.load(out)) >= 13


def test_another_models_index_and_force(image_folder: Path, tmp_path: Path, indexed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    other = build_tiny_bundle(tmp_path / "other", seed=1)
    assert index(other, image_folder, Path(indexed[1])) == 2
    assert "this bundle is" in capsys.readouterr().err
    assert index(other, image_folder, Path(indexed[1]), "--force", "--storage", "f16", "--image-tokens", "none") == 0
    loaded = GalleryIndex.load(indexed[1])
    assert (len(loaded), loaded.storage, loaded.image_storage) == (12, "f16", "none")
    assert index(other, image_folder, Path(indexed[1]), "--storage", "f32") == 2
    assert "was made with --storage f16" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_force_keeps_the_old_index_until_the_new_one_is_complete(
    bundle_path: Path, image_folder: Path, indexed: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(indexed[1])
    before, entries = contents(out), sorted(os.listdir(out.parent))
    good, add_batch = (image_folder / "sub" / "05.png").read_bytes(), Indexer._add_batch

    def interrupted(self: Indexer, *args: object, **options: object) -> None:
        assert contents(out) == before, "the new index took the old one's place before it was complete"
        add_batch(self, *args, **options)
        signal.raise_signal(signal.SIGINT)

    for bad in ("00.png", "sub/05.png"):  # the first one, and one after some saves
        content = (image_folder / bad).read_bytes()
        (image_folder / bad).write_bytes(b"broken")
        assert index(bundle_path, image_folder, out, "--force") == 2
        assert contents(out) == before
        (image_folder / bad).write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(Indexer, "_add_batch", interrupted)
        capsys.readouterr()
        assert index(bundle_path, image_folder, out, "--force") == 130
    assert f"interrupted: {out} is as it was" in capsys.readouterr().err
    assert contents(out) == before
    for image in image_folder.rglob("*.png"):
        image.write_bytes(b"broken")
    assert index(bundle_path, image_folder, out, "--force", "--skip-bad") == 2
    assert f"none of the images can be read, and {out} was not changed" in capsys.readouterr().err
    assert contents(out) == before
    assert sorted(os.listdir(out.parent)) == entries, "something was left beside the index"
    (image_folder / "sub" / "05.png").write_bytes(good)
    assert index(bundle_path, image_folder, out, "--force", "--skip-bad") == 0
    assert (
        "1 added, 0 changed, 0 with other metadata, 0 unchanged, 13 skipped (13 not an image), 0 pruned; 1 in the index"
        in capsys.readouterr().out
    )
    assert GalleryIndex.load(out, verify=True).ids == ("sub/05.png",)
    assert sorted(os.listdir(out.parent)) == entries


def test_a_folder_without_images(bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "notes.txt").write_text("not an image")
    assert index(bundle_path, tmp_path / "papers", tmp_path / "index") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'papers'}: no images")
    assert "(1 skipped: 1 not an image)" in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["papers"]


def test_what_is_passed_over_is_counted(bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image_folder / "._00.png").write_bytes(b"\0\5\x16\7" + bytes(50))
    (image_folder / "notes.txt").write_text("not an image")
    (image_folder / "00.png").rename(image_folder / "00")
    assert index(bundle_path, image_folder, tmp_path / "index") == 0
    captured = capsys.readouterr()
    assert "12 added" in captured.out
    assert "3 skipped (1 companions of macOS (._*), 2 not an image)" in captured.out
    assert "00" in GalleryIndex.load(tmp_path / "index").ids


def test_the_runner_leaves_bugs_their_traceback() -> None:
    def bug() -> int:
        raise RuntimeError("a bug")

    def interrupt() -> int:
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError):
        run(bug)
    assert run(interrupt) == 130


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("torch", "pip install 'dqe-engine[train]'"),
        ("transformers.models", "pip install 'dqe-engine[train]'"),
        ("yaml", "pip install 'dqe-engine[train]'"),
        ("matplotlib.pyplot", "pip install 'dqe-engine[train]'"),
        ("onnxscript", "pip install 'dqe-engine[export]'"),
        ("onnxruntime", "pip install 'dqe-engine[cpu]' or pip install 'dqe-engine[gpu]'"),
    ],
)
def test_a_missing_optional_package_is_one_line(capsys: pytest.CaptureFixture[str], name: str, remedy: str) -> None:
    def handler() -> int:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert run(handler) == 2
    assert capsys.readouterr().err == f"error: {name} is not installed; {remedy}\n"


@pytest.mark.parametrize("name", [None, "dqe_engine.absent", "torchvision", "numpy"])
def test_another_missing_module_is_a_bug(name: str | None) -> None:
    def handler() -> int:
        raise ModuleNotFoundError("No such module", name=name)

    with pytest.raises(ModuleNotFoundError):
        run(handler)


def test_a_real_interrupt_of_a_real_process(bundle_path: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: exit 130, and what is on the disk is whole and can be continued."""
    folder, out = tmp_path / "many", tmp_path / "index"
    folder.mkdir()
    for seed in range(400):
        noise_image(seed, (300, 300)).save(folder / f"{seed:03}.png")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    code = "import sys; from dqe_engine.cli.index import main; sys.exit(main())"
    arguments = [str(bundle_path), str(folder), "--out", str(out), "--batch-size", "1", "--save-every", "5", "--provider", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    while process.poll() is None and len(_saved(out)) < 10:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    watchdog.cancel()
    assert process.returncode == 130, error
    assert 10 <= len(_saved(out)) < 400
    assert f"{len(_saved(out))} images are saved" in error
    assert GalleryIndex.load(out, verify=True).ids[0] == "000.png"


def _saved(out: Path) -> tuple[str, ...]:
    return GalleryIndex.load(out).ids if (out / "manifest.json").exists() else ()
