"""Pages for contributors name files that exist, and versions agree wherever they stand."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import dqe_engine

ROOT = Path(__file__).parents[1]
FOLDERS = "dqe_engine|training|export|cpp_ext|benchmarks|tests|docs|.ci|.github"


def named_paths(text: str) -> set[str]:
    """Paths of the repository in code and in links, without placeholders such as NAME."""
    found = set(re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]+)", text))
    found |= {target.removeprefix("../") for target in re.findall(r"\]\(((?:\.\./)?[\w./-]+)\)", text)}
    return {path.rstrip(".") for path in found if "NAME" not in path}


def test_the_guides_name_files_that_exist() -> None:
    for page, least in (("CONTRIBUTING.md", 50), ("SECURITY.md", 3)):
        paths = named_paths((ROOT / ".github" / page).read_text(encoding="utf-8"))
        assert len(paths) >= least
        assert [path for path in paths if not (ROOT / path).exists() and not (ROOT / ".github" / path).exists()] == []


def test_a_file_that_is_gone_is_seen() -> None:
    assert named_paths("see `dqe_engine/nothing.py`, [this](../docs/gone.md) and `training/NAME.py`") == {
        "dqe_engine/nothing.py",
        "docs/gone.md",
    }


def test_recipes_name_what_their_files_hold() -> None:
    """Names in code that a recipe tells to extend."""
    for file, names in {
        "training/dqe_training/config/schema.py": ["class LossConfig", "_check(self, 0,"],
        "training/dqe_training/ablation/variants.py": ["PARTS", "def _losses"],
        "dqe_engine/contracts/graphs.py": ["class GraphSizes", "GRAPHS:", "def graphs_of"],
        "dqe_engine/contracts/manifest.py": ["SCHEMA_VERSION"],
        "export/dqe_export/graphs.py": ["_MODULES"],
        "tests/support/kernel_sources.py": ["X86_TILES", "ARM_TILES"],
        "training/dqe_training/data/public/detect.py": ["FINDERS ="],
        "training/dqe_training/data/public/names.py": ["TITLES"],
        "training/dqe_training/backbone/weights.py": ["UNUSED =", "NEW ="],
        "training/dqe_training/importing/importer.py": ["LAYOUTS"],
        "training/dqe_training/cli/import_.py": ["FORMATS ="],
        "training/dqe_training/evaluation/benchmarks.py": ["RANKING_PROTOCOLS", "def summary"],
        "tests/support/tiny_benchmarks.py": ["WRITERS"],
        "dqe_engine/server/policies.py": ["_TEMPLATES", "_EXCEPTIONS", "def policy_of"],
        "benchmarks/bench_zones.py": ["_PACKAGES"],
    }.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert [name for name in names if name not in text] == [], file


def test_versions_agree() -> None:
    changes = re.findall(r"^## \[(\d[\w.]*)\] - (\S+)$", (ROOT / "docs" / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert changes[0] == (dqe_engine.__version__, str(citation["date-released"]))
    assert citation["version"] == dqe_engine.__version__
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    used = {repository["repo"].rpartition("/")[2]: repository["rev"] for repository in hooks}
    assert used == {"ruff-pre-commit": f"v{pinned['ruff']}", "mirrors-clang-format": f"v{pinned['clang-format']}"}


def test_forms_ask_for_what_the_doctor_says() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    asked = [field["attributes"]["label"] for field in forms["bug"]["body"] if field.get("validations", {}).get("required")]
    assert any("dqe-doctor --json" in label for label in asked)
