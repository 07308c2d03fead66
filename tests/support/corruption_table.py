"""Print the table of corruptions: what the export gate says of each, in each precision. Exit code 1 where one passes.

PYTHONPATH=tests python -m support.corruption_table
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from support.corruptions import BUNDLE, CONVERTED, TRACED, refusal_of_bundle, refusal_of_converted, refusal_of_traced
from support.tiny_training import model_config, one_cpu_thread, write_checkpoint

from dqe_engine.contracts.graphs import GRAPHS
from dqe_engine.contracts.manifest import Precision
from dqe_export.bundle import export_bundle
from dqe_export.onnx_graph import export_graph
from dqe_export.precision import Lower, convert
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.model.cross_attention import upstream_attention

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
CONVERSIONS: tuple[Lower, ...] = ("float16", "int8")
_PASSES = "PASSES"


def _row(name: str, what: str, said: Sequence[str | None]) -> str:
    message = next((text for text in said if text), "").split(";")[0].replace("|", "/")
    return f"| {name} | {what} | {' | '.join('refused' if text else _PASSES for text in said)} | {message} |"


def _asked(ask: Callable[[Path], str | None], root: Path) -> str | None:
    """The answer of `ask` with a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        return ask(folder)
    finally:
        shutil.rmtree(folder)


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as temporary, one_cpu_thread():
        root = Path(temporary)
        checkpoint = load_checkpoint(write_checkpoint(root / "model", model_config(max_text_length=40)))
        print("tracing", file=sys.stderr, flush=True)
        export_bundle(checkpoint, root / "bundle")
        (root / "upstream").mkdir()
        with upstream_attention(checkpoint.model.qformer):
            for spec in GRAPHS:
                export_graph(spec, checkpoint.model, root / "upstream" / spec.file)
        sources: dict[Precision, Path] = {"float32": root / "bundle", "float16": root / "bundle", "int8": root / "upstream"}
        for precision in CONVERSIONS:
            (root / precision).mkdir()
            shutil.copytree(sources[precision], root / "work")
            for spec in GRAPHS:
                convert(root / "work" / spec.file, root / precision / spec.file, precision)
            shutil.rmtree(root / "work")
        print("| corruption | of | float32 | float16 | int8 | what is said first |\n|---|---|---|---|---|---|", flush=True)
        for name, wrong in TRACED.items():
            said = [
                _asked(lambda folder, p=p, wrong=wrong: refusal_of_traced(wrong, p, checkpoint, sources[p], folder, None), root)
                for p in PRECISIONS
            ]
            rows.append(_row(name, wrong.graph.name, said))
            print(rows[-1], flush=True)
        for name, wrong in CONVERTED.items():
            said = [
                _asked(
                    lambda folder, p=p, wrong=wrong: refusal_of_converted(wrong, p, checkpoint.model, sources[p], root / p, folder), root
                )
                for p in CONVERSIONS
            ]
            rows.append(_row(name, f"{wrong.graph.name}, converted", said).replace("converted | ", "converted | – | ", 1))
            print(rows[-1], flush=True)
        for name, (edit, _) in BUNDLE.items():
            said = [_asked(lambda folder, edit=edit: refusal_of_bundle(edit, checkpoint, root / "bundle", folder), root)] * len(PRECISIONS)
            rows.append(_row(name, "what the bundle reads", said))
            print(rows[-1], flush=True)
    passed = sum(_PASSES in row for row in rows)
    print(f"\n{len(rows)} corruptions, {passed} of which pass somewhere.")
    return int(passed > 0)


if __name__ == "__main__":
    sys.exit(main())
