"""The commands and the Python of docs/own-photos.md run as they stand there, on a folder of photos in the user's home."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from support.serving import serving

from dqe_engine import sample

PAGE = Path(__file__).parents[2] / "docs" / "own-photos.md"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos" / "summer"
    photos.mkdir(parents=True)
    for photo in sorted(sample.photos().glob("*.jpg"))[:8]:
        shutil.copy(photo, photos)
    (photos / "damaged.jpg").write_bytes((photos / photo.name).read_bytes()[:400])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(bash|python|)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["", "bash", "", "bash", "python"]
    (_, install), (_, names), (_, serve), (_, shell), (_, python) = blocks
    assert "pip install '.[cpu,serve]'" in install
    told = subprocess.run(["bash", "-euc", f"{names}\necho $BUNDLE $PHOTOS"], capture_output=True, text=True, check=True).stdout
    bundle, folder = told.split()
    assert (bundle, folder) == (str(sample.bundle()), str(tmp_path / "photos"))
    arguments = shlex.split(serve.replace("$BUNDLE", bundle).replace("$PHOTOS", folder))[1:]
    with serving([*arguments, "--provider", "cpu", "--threads", "1"], tmp_path) as server:
        assert b"<html" in urllib.request.urlopen(f"{server.url}/", timeout=30).read()
    done = subprocess.run(["bash", "-euc", names + shell], capture_output=True, text=True, check=True)
    assert "8 unchanged" in done.stdout or "8 added" in done.stdout
    assert done.stdout.count("summer/") >= 6
    exec(compile(python, "docs/own-photos.md", "exec"), {})
    assert capsys.readouterr().out.count("summer/") == 3
