"""The verdict of the zone kernels' benchmark: what was predicted, and what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks import gpu_zones


def case(**milliseconds: float) -> dict[str, Any]:
    names = {"ours": "ours, own best and zones", "torch": "PyTorch"}
    times = {names[name]: [ms, ms, 9 * ms] for name, ms in milliseconds.items()}
    return {"label": "top-k", "batch": 64, "milliseconds": times, "predicted_milliseconds": {names["ours"]: 1.0}}


def test_the_verdict_names_wrong_predictions_and_losses() -> None:
    assert gpu_zones.verdict([case(ours=1.2, torch=1.3)]) == [
        "VERDICT: 1 of 1 as predicted (within 1.25 x); slower than PyTorch in 0 cases"
    ]
    slow, lost, total = gpu_zones.verdict([case(ours=1.3, torch=1.2)])
    assert "1.300 ms, 1.30 x the 1.000 that were predicted" in slow
    assert "slower than PyTorch's plain topk (0.92 x)" in lost
    assert total == "VERDICT: 0 of 1 as predicted (within 1.25 x); slower than PyTorch in 1 cases"
    assert "0.50 x the 1.000" in gpu_zones.verdict([case(ours=0.5, torch=0.6)])[0]


def test_every_prediction_is_of_a_case_that_is_measured() -> None:
    predicted = gpu_zones.predictions()
    assert predicted.keys() == {*(f"top-k, {batch}" for batch in gpu_zones.BATCHES), "MaxSim, 64"}
    for cases in predicted.values():
        assert cases.keys() == {"PyTorch", *gpu_zones.MODES}
        assert all(case["ms"] > 0 and case["why"] for case in cases.values())
