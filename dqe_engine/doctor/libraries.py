"""Python and the libraries that the runtime always needs, each with a small use of it, and the optional extras."""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from dqe_engine import __version__

from .findings import Context, Finding, Steps, Trying
from .packages import Requirement, requirements

EXTRAS = ("train", "lora", "ray", "export", "serve")
"""`cpu` and `gpu` are what the sections on ONNX Runtime, TensorRT and FAISS are about."""

OLDEST_PYTHON = (3, 11)
_MODULES = {"pillow": "PIL"}


def probe(context: Context) -> Steps:
    yield _python()
    yield Trying("dqe-engine", "install dqe-engine: pip install .")
    for requirement in requirements():
        remedy = f"pip install --force-reinstall '{requirement.name}>={requirement.oldest}'"
        yield Trying(requirement.name, remedy)
        if requirement.installed is None:
            yield Finding(requirement.name, "broken", "not installed, but always needed", remedy)
        elif requirement.too_old:
            yield Finding(requirement.name, "broken", f"{requirement.installed}, needs {requirement.oldest}", remedy)
        else:
            import_module(_MODULES.get(requirement.name, requirement.name))
            used = _CHECKS[requirement.name]() if requirement.name in _CHECKS else ""
            found = f"{requirement.installed}: {used}" if used else requirement.installed
            yield Finding(requirement.name, "ok", found, facts={"version": requirement.installed})


def _python() -> Finding:
    version, oldest = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    found = f"{version} ({platform.python_implementation()}), dqe-engine {__version__}"
    facts = {"python": version, "dqe_engine": __version__, "executable": sys.executable}
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", "broken", f"{found}; expected {oldest} or newer", f"install Python {oldest} or newer", facts)
    return Finding("Python", "ok", found, facts=facts)


def probe_extras(context: Context) -> Steps:
    yield Trying("extras", "install dqe-engine: pip install .")
    for extra in EXTRAS:
        if needed := requirements(extra):  # an extra that brings nothing has nothing to miss
            yield _extra(extra, needed)


def _extra(extra: str, needed: list[Requirement]) -> Finding:
    remedy = f"pip install 'dqe-engine[{extra}]'"
    facts = {requirement.name: requirement.installed for requirement in needed}
    missing = [requirement.name for requirement in needed if requirement.installed is None]
    if len(missing) == len(needed):
        return Finding(extra, "not installed", f"without {', '.join(missing)}", remedy, facts)
    included = requirements(EXTRAS[0]) if extra != EXTRAS[0] else []  # said once is enough
    present = ", ".join(str(requirement) for requirement in needed if requirement.installed and requirement not in included)
    if missing:
        return Finding(extra, "not installed", f"without {', '.join(missing)} (there are {present})", remedy, facts)
    if any(requirement.too_old for requirement in needed):
        return Finding(extra, "broken", present, remedy, facts)
    return Finding(extra, "ok", present, facts=facts)


def _use_pillow() -> str:
    from PIL import Image, features

    formats = [name for name, codec in (("JPEG", "jpg"), ("PNG", "zlib"), ("WebP", "webp")) if features.check(codec)]
    for name in formats:
        stored = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 100, 50)).save(stored, name)
        colour = Image.open(stored).convert("RGB").resize((2, 2), Image.Resampling.BICUBIC).getpixel((0, 0))
        if not isinstance(colour, tuple) or max(abs(a - b) for a, b in zip(colour, (200, 100, 50), strict=True)) > 8:
            raise RuntimeError(f"a {name} image of one colour came back as {colour}")
    return f"reads {', '.join(formats)}"


def _use_tokenizers() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "in": 1, "red": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if (ids := tokenizer.encode("in red").ids) != [1, 2]:
        raise RuntimeError(f"'in red' became {ids}, expected [1, 2]")
    return "encodes"


_CHECKS: Mapping[str, Callable[[], str]] = {"pillow": _use_pillow, "tokenizers": _use_tokenizers}
