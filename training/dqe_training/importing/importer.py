"""From a published file of weights to a checkpoint: opened, planned, checked without a value, written one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dqe_engine.bundle import build_file_entries
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.provenance import Provenance, SourceFile
from dqe_engine.contracts.vocabulary import NO_ATTRIBUTES
from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import atomic_directory, describe_os_error, sha256_of

from ..backbone import describe_backbone
from ..backbone.tokenizer import load_backbone_tokenizer
from ..backbone.weights import weight_files
from ..checkpointing.checkpoint import tokenizer_spec
from ..checkpointing.meta import META, UNCALIBRATED_ZONES, WEIGHTS, CheckpointMeta, Progress
from ..config.schema import ModelConfig, TrainConfig
from ..model import DQEModel
from . import huggingface, lavis, qure, spn4cir, sprc
from .formats import Layout, base_query
from .moves import Move, Moves, check_moves
from .reading import Stored, WeightFile, open_weights
from .tokens import DEFAULT, load_tokenizer
from .towers import Tower, has_tower, read_tower
from .writing import Piece, write_safetensors

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (spn4cir.LAYOUT, sprc.LAYOUT, lavis.LAYOUT, qure.LAYOUT, huggingface.LAYOUT)
}


@dataclass(frozen=True)
class ImportOptions:
    """`layout`: a name of `LAYOUTS`; "" knows it by its keys. `tower`: the file of the vision tower, where the source has none.
    `tokenizer`: see `load_tokenizer`; "" is `DEFAULT`, or the source's own. Heads: attention heads, for widths that were never published.
    """

    layout: str = ""
    tower: Path | None = None
    tokenizer: str = ""
    vision_heads: int | None = None
    qformer_heads: int | None = None

    def __post_init__(self) -> None:
        if self.layout and self.layout not in LAYOUTS:
            raise InputError(f"--format {self.layout}: unknown; choose {', '.join(LAYOUTS)}")


@dataclass
class Plan:
    """What will be written: the model's description, and where each of its tensors comes from. `unused`: left-out tensors' reasons."""

    layout: Layout
    model: ModelConfig
    files: list[Path]
    tensors: dict[str, Stored]
    moves: Moves = field(default_factory=Moves)
    deviations: tuple[str, ...] = ()

    @property
    def unused(self) -> dict[str, str]:
        return self.moves.unused


def import_model(
    source: Path,
    out: Path,
    options: ImportOptions | None = None,
    *,
    force: bool = False,
    advance: Callable[[str], None] = lambda text: None,
) -> tuple[Plan, CheckpointMeta]:
    """Write the checkpoint `out` of the weights at `source`, a file or a directory of transformers.

    Values and their precision are the file's; no more than one tensor is in memory beside the mapped file. Raises CheckpointError, one
    line that names file and tensor, for what is not understood to the last tensor, and InputError for options that do not fit.
    """
    options = options or ImportOptions()
    if out.exists() and not force:
        raise InputError(f"{out}: exists already; choose another folder, or replace it with --force")
    plan = plan_import(source, options)
    tokenizer = _tokenizer(source, plan, options)
    provenance = Provenance(
        format=plan.layout.name, files=tuple(_described(file, advance) for file in plan.files), licence=plan.layout.licence,
        deviations=plan.deviations,
    )  # fmt: skip
    try:
        with atomic_directory(out, replace=force, marker=META) as temporary:
            for name in write_safetensors(temporary / WEIGHTS, _pieces(plan)):
                advance(f"writing {name}")
            spec = tokenizer_spec(plan.model, pad_id=0)
            tokenizer.save(str(temporary / spec.file))
            (temporary / "vocabulary.json").write_bytes(to_json(NO_ATTRIBUTES))
            advance("hashing what was written")
            meta = CheckpointMeta(
                config=TrainConfig(model=plan.model), tokenizer=spec, data_hash="", progress=Progress(finished=True),
                serving_zones=UNCALIBRATED_ZONES, files=build_file_entries(temporary), imported=provenance,
            )  # fmt: skip
            (temporary / META).write_bytes(to_json(meta))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({describe_os_error(error, out)})") from error
    return plan, meta


def plan_import(source: Path, options: ImportOptions) -> Plan:
    """What `import_model` would do, checked to the last shape without reading a value. Raises as it does."""
    if source.is_dir():
        return _plan_directory(source, options)
    return plan_file(open_weights(source), options)


def plan_file(file: WeightFile, options: ImportOptions) -> Plan:
    """`plan_import` of an opened file."""
    file = spn4cir.without_prefix(file)
    layout = _layout(file, options)
    if layout is huggingface.LAYOUT:
        if options.tower is not None:
            raise InputError(f"--tower {options.tower}: transformers' files hold their tower; leave it out")
        model = huggingface.describe(
            file.tensors, vision_heads=options.vision_heads, qformer_heads=options.qformer_heads, where=str(file.path)
        )
        return _plan_transformers(model, [file])
    return _plan_lavis_like(layout, file, options)


def _layout(file: WeightFile, options: ImportOptions) -> Layout:
    if options.layout:
        return LAYOUTS[options.layout]
    for layout in LAYOUTS.values():
        if layout.is_this(file):
            return layout
    names = ", ".join(sorted(file.tensors)[:3])
    raise CheckpointError(
        f"{file.path}: none of the layouts {', '.join(LAYOUTS)} (its tensors are {names}, …); a tower alone goes with --tower beside "
        "the file of the Q-Former"
    )


def _plan_lavis_like(layout: Layout, file: WeightFile, options: ImportOptions) -> Plan:
    where, moves, tensors, files = str(file.path), Moves(), dict(file.tensors), [file.path]
    own = has_tower(lavis.TOWER, tensors)
    if own and options.tower is not None:
        raise InputError(f"--tower {options.tower}: {where} holds a tower of its own; leave the option out")
    if not own and options.tower is None:
        raise CheckpointError(
            f"{where}: no vision tower in it (no {lavis.TOWER}*); give its file with --tower (LAVIS's eva_vit_g.pth or clip_vit_L.pth)"
        )
    if options.tower is not None:
        tensors |= {f"{lavis.TOWER}{name}": tensor for name, tensor in open_weights(options.tower).tensors.items()}
        files.append(options.tower)
    tower = read_tower(lavis.TOWER, tensors, moves, heads=options.vision_heads, alone=not own, where=where if own else str(options.tower))
    qformer = lavis.read_qformer(tensors, moves, heads=options.qformer_heads, where=where)
    if layout is spn4cir.LAYOUT:
        spn4cir.read_second_pass(tensors, moves, where=where)
    moves.leave(tensors, {**lavis.UNUSED, **layout.unused})
    queries, deviations = base_query(layout)
    model = ModelConfig(
        preprocessing=_preprocessing(layout, tower), vision=tower.config, qformer=qformer, base_query=queries, attribute_weights=False,
        captions="blip",
    )  # fmt: skip
    plan = Plan(layout, model, files, tensors, moves, deviations)
    check_moves(moves, tensors, _wanted(model), where=where)
    return plan


def _preprocessing(layout: Layout, tower: Tower) -> PreprocessingSpec:
    return PreprocessingSpec(image_size=tower.image_size, fit=layout.fit, background=layout.background)


def _plan_directory(source: Path, options: ImportOptions) -> Plan:
    if options.layout not in ("", "transformers"):
        raise InputError(f"--format {options.layout}: {source} is a directory, which transformers alone writes; give a file")
    for name in ("tower", "vision_heads", "qformer_heads"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: {source} says it in its files; leave the option out")
    return _plan_transformers(describe_backbone(source), [open_weights(path) for path in weight_files(source)])


def _plan_transformers(model: ModelConfig, files: list[WeightFile]) -> Plan:
    queries, deviations = base_query(huggingface.LAYOUT)
    model = msgspec.structs.replace(model, base_query=queries, attribute_weights=False)
    plan = Plan(huggingface.LAYOUT, model, [file.path for file in files], {}, deviations=deviations)
    for file in files:
        if twice := sorted(plan.tensors.keys() & file.tensors.keys()):
            raise CheckpointError(f"{file.path}: {twice[0]} is in another file, too; copy the checkpoint again")
        plan.tensors |= file.tensors
    huggingface.plan(plan.tensors, plan.moves)
    check_moves(plan.moves, plan.tensors, _wanted(model), where=str(files[0].path))
    return plan


def _wanted(model: ModelConfig) -> dict[str, torch.Size]:
    """The shapes of the model's tensors. It has no attribute heads, since no published file has any."""
    with torch.device("meta"):
        described = DQEModel(model, NO_ATTRIBUTES, 0)
    return {name: value.shape for name, value in described.state_dict().items()}


def _tokenizer(source: Path, plan: Plan, options: ImportOptions) -> Tokenizer:
    if source.is_dir() and not options.tokenizer:
        return load_backbone_tokenizer(source, plan.model.qformer.vocab_size)
    return load_tokenizer(options.tokenizer or DEFAULT, plan.model.qformer.vocab_size)


def _described(file: Path, advance: Callable[[str], None]) -> SourceFile:
    advance(f"hashing {file.name}")
    return SourceFile(name=file.name, size=os.stat(file).st_size, sha256=sha256_of(file))


def _pieces(plan: Plan) -> list[Piece]:
    """In the order of safetensors: wide numbers first, so that each lies at a multiple of its size."""
    wanted = _wanted(plan.model)
    pieces = [_piece(name, move, wanted[name], plan.tensors) for name, move in plan.moves.made.items()]
    return sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name))


def _piece(name: str, move: Move, shape: torch.Size, tensors: Mapping[str, Stored]) -> Piece:
    dtype = tensors[move.sources[0]].dtype if move.sources else torch.float32

    def read() -> Tensor:
        if not move.sources:
            return torch.zeros(shape)
        made = move.make([tensors[source].read() for source in move.sources])
        if not torch.isfinite(made).all():
            raise CheckpointError(f"{' and '.join(move.sources)}: holds NaN or infinity; the file is damaged, copy it again")
        return made

    return Piece(name, tuple(shape), dtype, read)
