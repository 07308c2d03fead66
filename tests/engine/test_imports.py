"""What the runtime loads, in fresh processes: never a training library, and nothing heavy for `--help`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = {"torch", "transformers", "onnx", "onnxscript", "safetensors", "dqe_training", "dqe_export"}
HEAVY = TRAINING | {"onnxruntime", "numpy", "PIL", "tokenizers", "rich", "msgspec", "faiss"}


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules that are loaded once `code` has run."""
    roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    script = f"{code}\nimport sys\nprint()\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def modules_loaded_by(code: str) -> set[str]:
    """Modules, by full name, that are loaded once `code` has run, but for the standard library's and what the interpreter begins with."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}


def test_the_package_alone_loads_nothing() -> None:
    assert not loaded_by("import dqe_engine; dqe_engine.__version__") & HEAVY
    assert modules_loaded_by("import dqe_engine") == {"dqe_engine"}


def test_what_the_engine_loads_is_known() -> None:
    """Every module here is paid for at each start of a server: one more is added knowingly. ONNX Runtime waits for the first bundle."""
    loaded = modules_loaded_by("from dqe_engine import RetrievalEngine")
    ours = {name.split(".")[1] for name in loaded if name.startswith("dqe_engine.")}
    assert ours == {
        "answering", "batching", "binding", "bundle", "caches", "captions", "compose", "contracts", "device_arrays", "device_tokens",
        "dialogue", "driver_library", "encoder", "engine", "errors", "files",
        "forks",
        "graph_files", "hub_paths",
        "image_cost", "image_metadata", "image_policy", "image_sources", "index", "indexer", "preprocessing", "processors",
        "query", "query_batcher", "results", "sessions", "tensorrt", "text",
        "tiff_directory", "zones",
    }  # fmt: skip
    packages = {name.partition(".")[0] for name in loaded if "cython" not in name}  # NumPy 1's extensions bring Cython's own modules
    assert packages - {"dqe_engine", "typing_extensions"} == {"PIL", "msgspec", "numpy", "tokenizers"}
    assert not {"dqe_engine._kernels", "dqe_engine.zones.cpu", "dqe_engine.zones.cuda", "dqe_engine.ray_indexing"} & loaded


def test_the_doctor_itself_loads_nothing_that_could_be_broken() -> None:
    loaded = loaded_by("from dqe_engine.doctor import examine\nassert examine()")
    assert not loaded & HEAVY
    assert "subprocess" in loaded


@pytest.mark.parametrize("command", ["index", "search", "doctor"])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = f"from dqe_engine.cli.{command} import main\ntry: main(['--help'])\nexcept SystemExit as done: assert done.code == 0"
    assert not loaded_by(code) & HEAVY


def test_a_whole_search_loads_no_training_library(bundle_path: Path, image_folder: Path) -> None:
    code = """
import sys
import dqe_engine
engine = dqe_engine.RetrievalEngine.load(sys.argv[1], provider="cpu")
engine.index_images(sys.argv[2])
assert len(engine.search(dqe_engine.Query(reference_id="00.png", text="in red", k=3, zones=True)).hits) == 3
"""
    loaded = loaded_by(code, str(bundle_path), str(image_folder))
    assert not loaded & (TRAINING | {"huggingface_hub"})
    assert {"onnxruntime", "numpy", "PIL", "tokenizers"} <= loaded, "the check must be able to see what was loaded"
