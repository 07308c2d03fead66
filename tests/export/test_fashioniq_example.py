"""docs/examples/fashioniq_run.py runs on its stand-in: FashionIQ's layout, a tiny model, every step."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dqe_training.data.public.fashioniq import FashionIQ

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "fashioniq_run.py"


@pytest.mark.slow
def test_fashioniq_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("fashioniq_run", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["fashioniq_run.py", str(tmp_path), "--stand-in", "optim.epochs=1"])
    example.main()
    pytorch, runtime = capsys.readouterr().out.strip().splitlines()[-2:]
    assert pytorch.startswith("PyTorch: ")
    assert "mean" in pytorch
    assert runtime.removeprefix("the runtime") == pytorch.removeprefix("PyTorch")
    found = FashionIQ.found_in(tmp_path / "fashioniq")
    assert found is not None
    assert len(found.training_records()) == 60
