"""An engine against ONNX Runtime on the same graph, at the least, optimal and largest shapes of every profile, an awkward one of each
and at all captured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dqe_engine.contracts.engines import Profile
from dqe_engine.contracts.graphs import DYNAMIC_AXES, GraphSizes, GraphSpec
from dqe_engine.contracts.manifest import GraphParity, Tolerance
from dqe_engine.sessions import GraphSession

from ..differences import Difference, check_range, summary
from ..inputs import random_arrays

_REFERENCE = "ONNX Runtime"


def check_engine(
    spec: GraphSpec,
    sizes: GraphSizes,
    engine: GraphSession,
    reference: GraphSession,
    profiles: Sequence[Profile],
    *,
    captured: Sequence[Mapping[str, int]] = (),
    vocab_size: int,
    tolerance: Tolerance,
) -> GraphParity:
    """Run both on the same seeded inputs. Raises ParityError where an output differs by more than `tolerance`, in length
    too, or is negative where it never should be; NaN always does.

    `tolerance` is what the bundle was held to against PyTorch. `reference` computes in float32 from the same rounded weights and, in
    "int8-static", the same rounded activations, so what is left to differ is the device's arithmetic. A profile has kernels of its own, so
    a batch of one text, which would fill its row, runs with padding too.
    """
    dynamic = [axis for axis in DYNAMIC_AXES if any(axis in tensor.axes for tensor in spec.inputs)]
    wanted = [shape for p in profiles for shape in (*(p.sizes(which) for which in ("min", "opt", "max")), _awkward(p))]
    shapes = {tuple((axis, shape[axis]) for axis in dynamic): {axis: shape[axis] for axis in dynamic} for shape in (*wanted, *captured)}
    measured: dict[str, list[Difference]] = {tensor.name: [] for tensor in spec.outputs}
    for seed, shape in enumerate(shapes.values()):
        for full in (True, False) if shape["batch"] == 1 and shape.get("text_length", 0) > 1 else (True,):
            inputs = random_arrays(spec, sizes, vocab_size, seed=seed, full=full, **shape)
            expected, found = reference.run(**inputs), engine.run(**inputs)
            for name, differences in measured.items():
                values, right = found[name].astype(np.float32), expected[name].astype(np.float32)
                where = f"at {shape}{'' if full else ', padded'}"
                difference = Difference(values, right)
                difference.check(f"{spec.name}: {name}", _REFERENCE, tolerance, where)
                check_range(f"{spec.name}: ", name, values, right, _REFERENCE, tolerance, where)
                differences.append(difference)
    outputs = {name: summary(f"{spec.name}: {name}", _REFERENCE, found, tolerance) for name, found in measured.items()}
    return GraphParity(graph=spec.name, outputs=outputs, shapes=tuple(shapes.values()))


def _awkward(profile: Profile) -> dict[str, int]:
    """Sizes beside those that are tuned for, mostly powers of two: kernels go wrong in the remainders of their tiles."""
    return {
        "batch": max(profile.batch.min, profile.batch.opt - 1),
        "text_length": max(profile.text_length.min, profile.text_length.max - 1),
    }
