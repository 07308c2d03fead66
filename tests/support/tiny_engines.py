"""TensorRT engines of the tiny bundle, by the builder of `fake_tensorrt`: single plans, and folders beside a bundle."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.fake_tensorrt import VERSION, FakeTensorRT
from support.tiny_bundle import SIZES

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.engines import ENGINES_FILE, AxisRange, EngineEntry, EngineManifest, Profile, folder_name
from dqe_engine.contracts.graphs import GRAPHS, GraphSpec
from dqe_engine.contracts.manifest import FileEntry, GraphParity
from dqe_engine.contracts.parsing import to_json
from dqe_engine.files import sha256_of

MAJOR, MINOR = VERSION.split(".")[:2]
HERE, NEXT = f"{MAJOR}.{MINOR}", f"{MAJOR}.{int(MINOR) + 1}"
ONE = Profile(batch=AxisRange(min=1, opt=1, max=1), text_length=AxisRange(min=2, opt=4, max=16))
MANY = Profile(batch=AxisRange(min=1, opt=3, max=6), text_length=AxisRange(min=2, opt=5, max=8))


def plan(trt: FakeTensorRT, bundle: Path, spec: GraphSpec, *profiles: Profile, **options: Any) -> bytes:
    shapes = [{t.name: [t.shape(SIZES, **p.sizes(w)) for w in ("min", "opt", "max")] for t in spec.inputs} for p in profiles]
    return trt.plan(bundle / spec.file, shapes, **options)


def engine_writer(trt: FakeTensorRT, bundle_path: Path, path: Path) -> Callable[..., Path]:
    """Writes engines into `tensorrt/<folder>` of a copy of the bundle, which is at `path`."""

    def write(
        version: str = trt.version, capability: str = "9.0", *, gpu: str = "Fake GPU", vc: bool = False, hc: bool = False, **made_from: str
    ) -> Path:
        bundle = path
        if not bundle.exists():
            shutil.copytree(bundle_path, bundle)
        folder = bundle / "tensorrt" / folder_name(gpu, capability, version, hardware_compatible=hc, version_compatible=vc)
        folder.mkdir(parents=True)
        manifest, entries = Bundle.load(bundle).manifest, []
        for spec in GRAPHS:
            file = folder / f"{spec.name}.engine"
            built = types.SimpleNamespace(version=version, capability=capability)
            file.write_bytes(FakeTensorRT.plan(built, bundle / spec.file, _shapes(spec), vc=vc, hc=hc))  # type: ignore[arg-type]
            entry = FileEntry(path=file.name, size=file.stat().st_size, sha256=sha256_of(file))
            made = made_from.get(spec.name) or manifest.graph_hash(spec)
            entries.append(
                EngineEntry(graph=spec.name, graph_hash=made, file=entry, build_seconds=1, layers=1, layer_types={}, device_memory=1,
                            graph_shapes=(), tolerance=manifest.tolerance, parity=GraphParity(graph=spec.name, outputs={}, shapes=()))
            )  # fmt: skip
        sidecar = {"precision": "float32", "gpu": gpu, "compute_capability": capability,
                   "tensorrt": version, "cuda_driver": "13.0", "hardware_compatible": hc, "version_compatible": vc, "tf32": False,
                   "optimization_level": 3, "workspace": None, "profiles": (MANY,), "engines": tuple(entries)}  # fmt: skip
        (folder / ENGINES_FILE).write_bytes(to_json(EngineManifest(**sidecar)))
        return bundle

    def _shapes(spec: GraphSpec) -> list[Any]:
        return [{t.name: [t.shape(SIZES, **MANY.sizes(w)) for w in ("min", "opt", "max")] for t in spec.inputs}]

    return write
