"""What all plots share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dqe_engine.files import atomic_write

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 150,
}


def save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with atomic_write(path) as stream:
        stream.write(buffer.getvalue())
    return path
