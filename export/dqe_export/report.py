"""The report of an export, in the bundle: report.json for machines, report.html for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dqe_engine.contracts.manifest import REPORT_FILES, BundleManifest, GraphParity, RetrievalParity, Tolerance
from dqe_engine.contracts.parsing import Contract, to_json
from dqe_engine.doctor.machine import processor_name
from dqe_engine.doctor.packages import installed_of
from dqe_engine.processors import cores
from dqe_training.machine import BUSY

from .latency import GraphLatency
from .sensitivity import LayerSensitivity

_TEMPLATE = "report.html.j2"
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime")
_MOST_LAYERS = 12


class GraphReport(Contract, frozen=True):
    """Sizes in bytes, `float32_size` of the same graph before its conversion; `layers`: int8's sweep, the most sensitive first."""

    graph: str
    size: int
    float32_size: int
    latency: tuple[GraphLatency, ...]
    layers: tuple[LayerSensitivity, ...] = ()


class ExportReport(Contract, frozen=True, kw_only=True):
    """What was measured of a bundle, and where. Latencies are of the machine that exported; `company` is the share of its processors'
    time that other processes took while they were measured, None where the system does not say."""

    name: str
    precision: str
    target: str
    why: str
    tolerance: Tolerance
    parity: tuple[GraphParity, ...]
    retrieval: RetrievalParity | None
    graphs: tuple[GraphReport, ...]
    company: float | None
    processor: str
    cores: int
    packages: dict[str, str]

    @property
    def busy(self) -> bool:
        """Whether others took so much that the times are too long."""
        return self.company is not None and self.company > BUSY

    @classmethod
    def of(cls, manifest: BundleManifest, graphs: Sequence[GraphReport], *, company: float | None, why: str) -> ExportReport:
        return cls(
            name=manifest.name, precision=manifest.precision, target=manifest.target, why=why, tolerance=manifest.tolerance,
            parity=manifest.parity, retrieval=manifest.retrieval, graphs=tuple(graphs), company=company, processor=processor_name(),
            cores=cores(), packages=installed_of(_PACKAGES),
        )  # fmt: skip


def write_report(directory: Path, report: ExportReport) -> None:
    for file, content in zip(REPORT_FILES, (to_json(report), report_html(report).encode()), strict=True):
        (directory / file).write_bytes(content)


def report_html(report: ExportReport) -> str:
    """One page without scripts or other files. Everything that comes from `report` is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    sensitive = [layer for graph in report.graphs for layer in graph.layers]
    sensitive.sort(key=lambda layer: layer.cosine)
    shown = [layer for i, layer in enumerate(sensitive) if i < _MOST_LAYERS or layer.kept]
    return environment.get_template(_TEMPLATE).render(report=report, layers=shown, swept=len(sensitive))
