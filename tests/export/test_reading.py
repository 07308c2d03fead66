"""What reaches the graphs of a bundle: held against upstream's reading whatever the fit, and a fault of either side shows."""

from __future__ import annotations

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from dqe_engine import encoder as encoder_module
from dqe_engine import indexer as indexer_module
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import ParityError
from dqe_engine.image_policy import ImagePolicy
from dqe_engine.preprocessing import preprocess
from dqe_export.cli.export import main
from dqe_export.reading import check_reading
from dqe_export.reading_samples import sample_images
from dqe_export.upstream_reading import pixel_values
from dqe_training.checkpointing.checkpoint import Checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    return load_checkpoint(checkpoint_path)


@pytest.mark.parametrize(
    ("fit", "resample", "ratio", "background"),
    [(*kinds, *how) for kinds, how in zip(
        itertools.product(("stretch", "target_pad", "target_pad_crop"), ("bicubic", "bilinear")),
        itertools.cycle([(1.25, (255, 255, 255)), (1.0, (0, 0, 0)), (1.7, (10, 0, 250))]), strict=False,
    )],
)  # fmt: skip
def test_every_fit_equals_upstream_behind_padding_in_numpy(fit: Any, resample: Any, ratio: float, background: Any) -> None:
    spec = PreprocessingSpec(image_size=20, fit=fit, resample=resample, target_ratio=ratio, background=background)
    for name, data in sample_images(spec.image_size).items():
        np.testing.assert_allclose(preprocess([data], spec)[0], pixel_values(data, spec), rtol=0, atol=1e-6, err_msg=name)


def test_the_check_sees_a_fault_of_the_runtimes_own(checkpoint: Checkpoint, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that PyTorch's side shares, so that no comparison of answers could show it."""
    check_reading(checkpoint, bundle_path)
    normalise = encoder_module.normalise

    def as_stored(data: Any, spec: PreprocessingSpec, policy: ImagePolicy) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    for name, broken, said in (
        ("open_image", as_stored, r"an image \(transparent\), as a reference"),
        ("normalise", lambda pixels, spec: normalise(pixels[..., ::-1], spec), r"an image \(wide\), as a reference"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(encoder_module, name, broken)
            with pytest.raises(ParityError, match=f"preprocessing: {said}"):
                check_reading(checkpoint, bundle_path)


def test_the_check_sees_a_gallery_that_is_read_otherwise(
    checkpoint: Checkpoint, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = indexer_module.fit_image
    monkeypatch.setattr(indexer_module, "fit_image", lambda image, spec: fit(image, msgspec.structs.replace(spec, resample="bilinear")))
    with pytest.raises(ParityError, match="in the gallery, reaches the vision encoder with other pixels"):
        check_reading(checkpoint, bundle_path)


def test_the_check_sees_names_on_other_heads(checkpoint: Checkpoint, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest's order is right, and the runtime counts from the other end."""
    apply = encoder_module.apply_overrides
    monkeypatch.setattr(encoder_module, "apply_overrides", lambda weights, names, overrides: apply(weights, names[::-1], overrides))
    with pytest.raises(ParityError, match=r"attributes: the weight of '.*' moves another head"):
        check_reading(checkpoint, bundle_path)


def test_heads_go_into_bundles_that_read_as_they_were_trained(
    checkpoint_path: Path, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from support.corruptions import BUNDLE
    from support.replayed_export import replay

    monkeypatch.setattr(torch.onnx, "export", replay(bundle_path))
    shutil.copytree(bundle_path, tmp_path / "bundle")
    BUNDLE["upper case kept"][0](tmp_path / "bundle")
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    assert main([str(checkpoint_path), "--heads-only", "--bundle", str(tmp_path / "bundle")]) == 1
    assert "error: tokenizer: a text (capitals" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before
