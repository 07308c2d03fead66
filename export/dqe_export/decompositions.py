"""The few operators of our graphs that ONNX lacks, taken apart by hand, so that an export traces each graph once and not three times."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

_ATEN = torch.ops.aten
_CASTS = (_ATEN.to.dtype, _ATEN.to.dtype_layout)
_ASSERTIONS = (_ATEN._assert_scalar.default, _ATEN._assert_tensor_metadata.default, _ATEN.sym_constrain_range_for_size.default)
_REVERSED = _ATEN.rsub.Scalar


@contextmanager
def decomposed_by_hand() -> Iterator[None]:
    """Inside, `ExportedProgram.run_decompositions`, which `torch.onnx.export` calls, rewrites in place what it can.

    PyTorch's own traces the whole program again, twice, which is half of an export's time. It is still what runs where a program holds an
    operator that `table` names and this file does not know, or one that writes to what others read.
    """
    original = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, decomp_table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        _remove_assertions(program)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        if decomp_table is None or options or not all(_is_known(node, decomp_table) for node in calls):
            return original(program, decomp_table, **options)
        for node in calls:
            if (new := _rewritten(program, node)) is not node:
                program.graph_signature.replace_all_uses(node.name, new.name)
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
        program.graph_module.recompile()
        return program

    ExportedProgram.run_decompositions = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = original  # type: ignore[method-assign]


def _remove_assertions(program: ExportedProgram) -> None:
    """And what only they read. `torch.onnx.export` drops assertions itself, but leaves their operands, which ONNX may lack."""
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _is_known(node: Node, table: Mapping[Any, Any]) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return getattr(operator, getattr(target, "__name__", ""), None) is target  # of sizes
    if target == _REVERSED:
        return len(node.args) == 2
    if target._schema.is_mutable:
        return (functional := _functional(node)) is not None and functional not in table
    return target not in table


def _rewritten(program: ExportedProgram, node: Node) -> Node:
    """What gives the same as `node`, which may be itself."""
    if node.target in _CASTS:
        (source, dtype) = node.args[0], node.meta["val"].dtype
        assert isinstance(source, Node)
        return source if source.meta["val"].dtype == dtype else _call(program, node, _ATEN._to_copy.default, (source,), {"dtype": dtype})
    if node.target == _REVERSED:
        return _call(program, node, _ATEN.sub.Tensor, (node.args[1], node.args[0]), {})
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        functional = _functional(node)
        assert functional is not None
        return _call(program, node, functional, node.args, node.kwargs)
    return node


def _call(program: ExportedProgram, old: Node, target: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Node:
    with program.graph.inserting_before(old):
        new = program.graph.call_function(target, args, dict(kwargs))
    new.meta = dict(old.meta)
    return new


def _functional(node: Node) -> OpOverload | None:
    """`add` for an `add_` whose first operand is a tensor of its own that nothing else reads; else None."""
    target, written = node.target, node.args[0]
    assert isinstance(target, OpOverload)
    namespace, name = target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or not isinstance(written, Node) or list(written.users) != [node]:
        return None
    if not isinstance(written.target, OpOverload) or any(value.alias_info is not None for value in written.target._schema.returns):
        return None
    found = getattr(getattr(_ATEN, name[:-1], None), target._overloadname, None)
    return found if isinstance(found, OpOverload) else None
