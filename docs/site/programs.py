"""An example as a page: a program whole, a notebook cell by cell."""

from __future__ import annotations

import ast
import json
from pathlib import Path


def page_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells) + "\n"
    about = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return f'# {path.name}\n\n{about}\n\n```python title="docs/examples/{path.name}"\n{text.strip()}\n```\n'
