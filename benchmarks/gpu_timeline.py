"""One search as the device ran it: when each kernel began, how long it took, what lay between them, and what of the call is the host's.

python -m benchmarks.gpu_timeline [--batch 1]        needs a CUDA device and PyTorch

Kernels that start early overlap the one ahead: their time includes what they wait there, and the gap before them is negative. The
profiler itself makes launches slower, so compare kernels and gaps with each other, and the whole with `gpu_zones`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dqe_engine.zones import cuda

ITEMS, WIDTH, K = 1_000_000, 256, 100
CALL = "dqe search"


class Span(NamedTuple):
    """Of one clock, in microseconds."""

    name: str
    start: float
    end: float


def timeline(call: Span, kernels: Sequence[Span]) -> list[str]:
    """A line for each kernel (or fill, or copy) by its start, and one of totals. call: what the host did, from its first step to its
    last."""
    ordered = sorted(kernels, key=lambda span: span.start)
    if not ordered:
        return ["no kernel was seen"]
    lines, ended, busy = [], ordered[0].start, 0.0
    for span in ordered:
        lines.append(
            f"{span.start - call.start:9.1f} us  gap {span.start - ended:7.1f}  takes {span.end - span.start:7.1f}  {span.name[:90]}"
        )
        busy += max(0.0, span.end - max(span.start, ended))
        ended = max(ended, span.end)
    before, between, after = ordered[0].start - call.start, ended - ordered[0].start - busy, call.end - ended
    whole = call.end - call.start
    lines.append(f"call {whole:.1f} us: device {busy:.1f}, host before {before:.1f}, gaps {between:.1f}, host after {after:.1f}")
    return lines


def profiled(torch: Any, search: Callable[[], Any]) -> list[str]:
    """The timeline of one call, after some to warm up."""
    from torch.profiler import ProfilerActivity, profile, record_function

    device_type = torch.autograd.DeviceType
    for _ in range(5):
        search()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        search()  # the first call under the profiler starts it
        torch.cuda.synchronize()
        with record_function(CALL):
            search()
    spans = [(event.device_type, Span(event.name, event.time_range.start, event.time_range.end)) for event in recorded.events()]
    (call,) = (span for device, span in spans if device == device_type.CPU and span.name == CALL)
    return timeline(call, [s for device, s in spans if device == device_type.CUDA and call.start <= s.start < call.end and s.name != CALL])


def searching(torch: Any, index: cuda.Index, queries: Any, stream: int) -> Callable[[], Any]:
    def search() -> Any:
        found = index.select(queries, k=K, stream=stream)
        return torch.from_dlpack(found.scores), torch.from_dlpack(found.ids)

    return search


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    options = parser.parse_args()
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    items = torch.nn.functional.normalize(torch.randn(ITEMS, WIDTH, device="cuda", generator=generator), dim=1).half()
    stream = torch.cuda.current_stream().cuda_stream
    for screen in (False, True):
        index = cuda.Index(items, stream=stream, screen=screen)
        for batch in options.batch:
            queries = torch.nn.functional.normalize(torch.randn(batch, WIDTH, device="cuda", generator=generator), dim=1).half()
            print(f"B = {batch}, {'screened' if screen else 'unscreened'}")
            print("\n".join(profiled(torch, searching(torch, index, queries, stream))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
