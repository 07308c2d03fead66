"""An engine against ONNX Runtime on the same graph, at the least, optimal and largest shapes of every profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dqe_engine.contracts.engines import EngineParity, Profile
from dqe_engine.contracts.graphs import GraphSizes, GraphSpec
from dqe_engine.contracts.manifest import Precision
from dqe_engine.errors import ParityError
from dqe_engine.sessions import GraphSession

from ..inputs import random_arrays

TOLERANCES: Mapping[Precision, tuple[float, float]] = {
    "float32": (1e-4, 1e-3), "float16": (2e-2, 2e-2), "int8": (5e-2, 5e-2), "int8-static": (5e-2, 5e-2),
}  # fmt: skip
"""By the bundle's precision: (atol, rtol), an element may be off by atol + rtol × its size. Chosen, not yet measured on a GPU."""


class EngineMismatchError(ParityError):
    """An engine that computes something else than its graph."""


def check_engine(
    spec: GraphSpec,
    sizes: GraphSizes,
    engine: GraphSession,
    reference: GraphSession,
    profiles: Sequence[Profile],
    *,
    vocab_size: int,
    precision: Precision,
) -> tuple[EngineParity, ...]:
    """Run both on the same seeded inputs. Raises EngineMismatchError where an output differs by more than allowed; NaN always does."""
    atol, rtol = TOLERANCES[precision]
    dynamic = {str(tensor_axis) for tensor in spec.inputs for tensor_axis in tensor.axes}
    shapes = [{axis: size for axis, size in p.sizes(which).items() if axis in dynamic} for p in profiles for which in ("min", "opt", "max")]
    measured = []
    for seed, shape in enumerate(list({tuple(shape.items()): shape for shape in shapes}.values())):
        inputs = random_arrays(spec, sizes, vocab_size, seed=seed, **shape)
        expected, found = reference.run(**inputs), engine.run(**inputs)
        worst = {}
        for tensor in spec.outputs:
            error = np.abs(found[tensor.name] - expected[tensor.name])
            worst[tensor.name] = float(error.max())
            if not (error <= atol + rtol * np.abs(expected[tensor.name])).all():
                raise EngineMismatchError(
                    f"{spec.name}: {tensor.name} differs from ONNX Runtime by {worst[tensor.name]:.2e} at {shape}, "
                    f"more than {atol:.0e} + {rtol:.0e} × its size; the engine was removed"
                )
        measured.append(EngineParity(shape=shape, max_abs_error=worst))
    return tuple(measured)
