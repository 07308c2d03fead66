"""Published files that are not understood to the last tensor, and options that do not fit: each is one line that names what is wrong."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import published_models as files
from support.importing import options
from support.published_models import TINY

from dqe_engine.errors import CheckpointError, InputError
from dqe_training.importing import ImportOptions, import_model
from dqe_training.importing.reading import open_weights

Change = Callable[[files.State], object]
EVA = "visual_encoder."


def put(name: str, value: torch.Tensor) -> Change:
    return lambda state: state.update({name: value})


def without(part: str) -> Change:
    return lambda state: [state.pop(name) for name in list(state) if part in name]


WRONG: dict[str, tuple[Change, str]] = {
    "no tower": (without(EVA), "no vision tower in it.*--tower"),
    "a missing tensor": (without("text_proj.bias"), "text_proj.bias is missing"),
    "a missing block": (without(".blocks.0."), r"layers visual_encoder.blocks.N are not 0, 1, 2"),
    "a missing norm": (without(".blocks.1.norm2.weight"), r"visual_encoder.blocks.1.norm2.weight is missing"),
    "an unknown one": (put(f"{EVA}blocks.0.gamma_1", torch.ones(24)), "unknown weight visual_encoder.blocks.0.gamma_1"),
    "a wrong shape": (put("text_proj.weight", torch.ones(9, 16)), r"text_proj.weight has shape \(9, 16\).*need \(8, 16\)"),
    "a wrong part of a joined bias": (put(f"{EVA}blocks.1.attn.q_bias", torch.ones(7)), "blocks.1.attn.q_bias has shape"),
    "a tower of another width": (put("ln_vision.weight", torch.ones(25)), "ln_vision.weight has shape"),
    "positions of no square": (put(f"{EVA}pos_embed", torch.ones(1, 9, 24)), "one more than a square"),
    "an index where numbers belong": (put("ln_vision.bias", torch.ones(24, dtype=torch.int64)), "ln_vision.bias holds torch.int64"),
    "a scalar table": (put("query_tokens", torch.tensor(1.0)), "query_tokens has shape"),
    "NaN": (put("text_proj.bias", torch.full((8,), torch.nan)), "text_proj.bias: holds NaN"),
    "infinity in half a bias": (put(f"{EVA}blocks.0.attn.v_bias", torch.full((24,), torch.inf)), "v_bias: holds NaN or infinity"),
    "no names that are known": (lambda s: [s.clear(), s.update({"a": torch.ones(2)})], "none of the layouts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_understood_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    change, said = WRONG[name]
    state = files.random_state(files.shapes_of("lavis", TINY["eva"]))
    change(state)
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=said) as caught:
        import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, TINY["eva"]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_a_file_that_needs_code_is_refused_by_the_codes_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(1)}, "more": Harmful()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: needs posix\.mkdir to be read, which could run code, so it is not loaded"):
        open_weights(tmp_path / "a.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickle", "old", "a list", "two models", "no tensors", "a folder", "missing"])
def test_files_that_are_none_are_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    state = {"a": torch.ones(300)}
    torch.save({"list": [state], "two models": {"x": state, "y": state}, "no tensors": {"epoch": 3}}.get(damage, state), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage in ("text", "empty"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n" if damage == "text" else "")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif damage == "old":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif damage == "a list":
        torch.save([state], path)
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "missing":
        path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.pth") as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    size = TINY["eva"]
    files.save("lavis", tmp_path / "a.pth", size)
    with pytest.raises(InputError, match="holds a tower of its own"):
        import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, size, tower=tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match="width 24 is none of the published 1408, 1024; say its heads with --vision-heads"):
        import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, size, vision_heads=None))
    with pytest.raises(CheckpointError, match="no multiple of 5 heads; correct --qformer-heads"):
        import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, size, qformer_heads=5))
    with pytest.raises(InputError, match="--format clip4cir: unknown; choose spn4cir, sprc"):
        ImportOptions(layout="clip4cir")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: has 31 tokens, the embedding table 40 rows"):
        import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, replace(size, words=32)))
    with pytest.raises(InputError, match=r"no such file; give a tokenizer\.json or vocab.txt"):
        import_model(tmp_path / "a.pth", tmp_path / "out", ImportOptions(tokenizer="none.txt", vision_heads=4, qformer_heads=2))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, size))
