"""Dataset images in arrays, and the twin of the runtime's normalisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.samples import noise_image

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.preprocessing import normalise, preprocess
from dqe_training.data import images
from dqe_training.data.images import load_pixels, to_pixel_values

SPEC = PreprocessingSpec(image_size=16)


@pytest.mark.parametrize("spec", [SPEC, PreprocessingSpec(image_size=16, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.7))])
def test_normalisation_is_the_runtimes(spec: PreprocessingSpec) -> None:
    every = np.stack([np.arange(256, dtype=np.uint8)] * 3, axis=-1).reshape(1, 16, 16, 3)
    noise = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    pixels = np.concatenate([every, noise])
    values = to_pixel_values(pixels, spec)
    assert values.is_contiguous()
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), normalise(pixels, spec))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for seed in range(7):
        noise_image(seed).save(tmp_path / (f"sub/{seed}.png" if seed % 2 else f"{seed}.png"))
    return tmp_path


NAMES = [f"sub/{seed}.png" if seed % 2 else f"{seed}.png" for seed in range(7)]


@pytest.mark.parametrize("chunk", [64, 2])
def test_images_come_in_the_order_asked_for_as_the_runtime_sees_them(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(images, "_CHUNK", chunk)
    names = NAMES[::-1]
    done: list[int] = []
    pixels = load_pixels(folder, names, SPEC, advance=done.append)
    assert sum(done) == 7
    assert pixels.shape == (7, 16, 16, 3)
    np.testing.assert_array_equal(to_pixel_values(pixels, SPEC).numpy(), preprocess([folder / name for name in names], SPEC))


def test_no_images() -> None:
    assert load_pixels(Path(), [], SPEC).shape == (0, 16, 16, 3)


def test_missing_images_are_named_and_counted(folder: Path) -> None:
    with pytest.raises(InputError, match=r"5 of 7 images are missing: a\.png, b\.png, c\.png and 2 more"):
        load_pixels(folder, ["0.png", "sub/1.png", "a.png", "b.png", "c.png", "d.png", "e.png"], SPEC)


@pytest.mark.parametrize("chunk", [64, 2])
def test_unreadable_images_are_named_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(images, "_CHUNK", chunk)
    Image.new("RGB", (9, 9)).save(folder / "4.png")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:40])
    (folder / "sub" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 7 images cannot be read: sub/1\.png \(not an image of an accepted format.*\), 4\.png \("):
        load_pixels(folder, NAMES, SPEC)
