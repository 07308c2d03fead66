"""What nvcc makes of the CUDA kernels: instructions that were meant, no spills, and how many instructions the inner loops take."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support import sass
from support.compiling import compiled, compiled_and_said

CUDA = Path(__file__).resolve().parents[2] / "cpp_ext" / "cuda"

BUDGETS = {  # product and rows of a query tile: instructions of a chunk, of a tile in which nothing reaches a limit
    ("sieve", "half", 16): (82, 80),
    ("sieve", "half", 64): (112, 120),
    ("sieve", "split", 16): (100, 95),
    ("sieve", "split", 64): (158, 145),
    ("keep", "half", 16): (82, 100),
    ("keep", "half", 64): (115, 220),
    ("keep", "split", 16): (100, 175),
    ("keep", "split", 64): (158, 320),
    ("zone", "half", 16): (85, 212),
    ("zone", "half", 64): (116, 425),
    ("zone", "split", 16): (102, 230),
    ("zone", "split", 64): (158, 515),
    ("screen", "codes", 16): (82, 160),
    ("screen", "codes", 64): (115, 280),
}
"""Of the kernels that score from registers, for sm_90 and nvcc 13.0. Each warp of a block issues them: at 16 warps on a multiprocessor,
four times as many cycles as a chunk has instructions."""
HOPPER_BUDGETS = {  # product, times 64 rows of a warpgroup, what happens to a tile: as above
    ("half", 1, "take"): (62, 125),
    ("half", 2, "take"): (98, 197),
    ("split", 1, "take"): (104, 132),
    ("half", 1, "sample"): (65, 490),
    ("half", 2, "sample"): (97, 850),
    ("split", 1, "sample"): (90, 570),
    ("half", 1, "keep"): (62, 215),
    ("half", 2, "keep"): (100, 385),
    ("split", 1, "keep"): (104, 355),
    ("half", 1, "zone"): (68, 525),
    ("half", 2, "zone"): (104, 975),
    ("split", 1, "zone"): (104, 665),
}
"""For sm_90a. Eight warps of a block multiply, two on each of a multiprocessor's four schedulers."""
HOPPER_SCREEN_BUDGET = (57, 300)
"""The same for codes, whatever reaches a limit. Two blocks: four warps on each scheduler."""
NAME = re.compile(r"(sieve|keep|zone)_kernel<\(dqe::cuda::Product\)(\d), (\d+)(, false)?>|(screen)_kernel<(\d+)>")


HOPPER = re.compile(r"hopper_(keep_|zone_|)kernel<\(dqe::cuda::Product\)(\d), (\d+)(, true)?")


def nvcc() -> str:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc")
    return compiler


def built(factory: pytest.TempPathFactory, architecture: int | str) -> tuple[Path, str]:
    """The object file, and what the compiler said."""
    source = "hopper" if architecture == "90a" else "zones"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-Xcompiler=-Wall", target]
    return compiled_and_said(factory, [nvcc(), *flags, "-c", CUDA / f"{source}.cu"], f"zones-{architecture}")


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kernels"), [(80, 20), (90, 20), ("90a", 13)])
def test_nvcc_compiles_without_warnings_and_spills(tmp_path_factory: pytest.TempPathFactory, architecture: int | str, kernels: int) -> None:
    said = built(tmp_path_factory, architecture)[1]
    assert "warning" not in said
    assert "(C7" not in said, "products of a warpgroup are serialised"
    spills = [line for line in said.splitlines() if "spill" in line]
    assert len(spills) >= kernels
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


def distances(kernel: sass.Kernel, work: str, chunk: tuple[int, int], tile: tuple[int, int]) -> list[int]:
    """Where a kernel for zones takes each Δ of a tile: a shorter path is that of a warp without queries."""
    return kernel.where(r"\bFADD\b", chunk[1], tile[1]) if work == "zone" else []


@pytest.mark.slow
def test_instructions_stay_within_their_budgets(tmp_path_factory: pytest.TempPathFactory) -> None:
    program = sass.disassembler()
    if program is None:
        pytest.skip("no cuobjdump: on PATH, in CUDA_HOME, or in Triton's wheel")
    seen, over = {}, []
    for kernel in sass.kernels(sass.dumped(program, built(tmp_path_factory, 90)[0])):
        assert not kernel.where(r"\b(LDL|STL)\b"), f"{kernel.name} uses local memory"
        if not (found := NAME.search(kernel.name)):
            continue
        chunk = kernel.innermost("IMMA" if found[5] else "HMMA")
        tile = kernel.around(chunk)
        assert len(kernel.where(r"\bBAR\.SYNC", *chunk)) == 1, "one barrier a chunk"
        copies = kernel.where("LDGSTS", *chunk)
        assert len(copies) == 4
        rest = kernel.shortest(chunk[1], tile[1], through=distances(kernel, found[1], chunk, tile)) + kernel.shortest(tile[0], chunk[0]) - 2
        name = ("screen", "codes", int(found[6])) if found[5] else (found[1], ("half", "split")[int(found[2])], int(found[3]))
        seen[name] = kernel.shortest(*chunk, through=copies), rest
        print(*name, *seen[name])
        if any(count > budget for count, budget in zip(seen[name], BUDGETS[name], strict=True)):
            over.append(f"{name}: {seen[name]} for {BUDGETS[name]}")
    assert not over
    assert seen.keys() == BUDGETS.keys()


@pytest.mark.slow
def test_instructions_for_hopper_stay_within_their_budgets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One thread brings boxes; the products of a chunk are one group, and one older group at most is waited for."""
    program = sass.disassembler()
    if program is None:
        pytest.skip("no cuobjdump: on PATH, in CUDA_HOME, or in Triton's wheel")
    seen, over = {}, []
    for kernel in sass.kernels(sass.dumped(program, built(tmp_path_factory, "90a")[0])):
        if not (found := HOPPER.search(kernel.name)):
            continue
        product, tall = ("half", "split")[int(found[2])], int(found[3])
        work = found[1].rstrip("_") or ("sample" if found[4] else "take")
        assert not kernel.where(r"\b(LDL|STL)\b"), f"{kernel.name} uses local memory"
        assert len(kernel.where(r"\bUTMALDG\.2D\b")) >= 2, "queries and items"
        assert len(kernel.where(r"\bUSETMAXREG\b")) == 2
        chunk = kernel.innermost("HGMMA")
        products = kernel.where(r"\bHGMMA\.64x128x16\.F32\b")
        assert len(products) == 4 * tall * (2 if product == "split" else 1)
        assert kernel.where(r"HGMMA.*gsb0") == products[-1:]
        assert [kernel.text[a].split("gsb0, ")[1] for a in kernel.where(r"WARPGROUP\.DEPBAR", *chunk)] == ["0x1"]
        tile = kernel.around(chunk)
        rest = kernel.shortest(chunk[1], tile[1], through=distances(kernel, work, chunk, tile)) + kernel.shortest(tile[0], chunk[0]) - 2
        name = (product, tall, work)
        seen[name] = kernel.shortest(*chunk, through=products), rest
        print(*name, *seen[name])
        if any(count > budget for count, budget in zip(seen[name], HOPPER_BUDGETS[name], strict=True)):
            over.append(f"{name}: {seen[name]} for {HOPPER_BUDGETS[name]}")
    assert not over
    assert seen.keys() == HOPPER_BUDGETS.keys()


@pytest.mark.slow
def test_instructions_for_codes_on_hopper_stay_within_their_budget(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tile's numbers come with its last chunk, by a copy of their own; one vote ends a tile in which nothing reaches a limit."""
    program = sass.disassembler()
    if program is None:
        pytest.skip("no cuobjdump: on PATH, in CUDA_HOME, or in Triton's wheel")
    dump = sass.dumped(program, built(tmp_path_factory, "90a")[0])
    (kernel,) = (kernel for kernel in sass.kernels(dump) if "hopper_screen_kernel" in kernel.name)
    assert not kernel.where(r"\b(LDL|STL)\b"), "local memory"
    assert len(kernel.where(r"\bUTMALDG\.2D\b")) >= 3, "queries, items and numbers"
    assert len(kernel.where(r"\bUSETMAXREG\b")) == 2
    chunk = kernel.innermost("IGMMA")
    products = kernel.where(r"\bIGMMA\.64x64x32\.S8\.S8\b")
    assert len(products) == 4
    assert kernel.where(r"IGMMA.*gsb0") == products[-1:]
    assert [kernel.text[a].split("gsb0, ")[1] for a in kernel.where(r"WARPGROUP\.DEPBAR", *chunk)] == ["0x1"]
    tile = kernel.around(chunk)
    conversions = kernel.where(r"\bI2FP?\.F32\.S32\b", chunk[1], tile[1])[:32]
    vote = kernel.where(r"\bVOTE\.ANY\b", conversions[-1])[0]
    rest = kernel.shortest(chunk[1], tile[1], through=[*conversions, vote]) + kernel.shortest(tile[0], chunk[0]) - 2
    seen = kernel.shortest(*chunk, through=products), rest
    print(*seen)
    assert all(count <= budget for count, budget in zip(seen, HOPPER_SCREEN_BUDGET, strict=True)), seen


def test_a_path_is_the_shortest_that_the_code_allows() -> None:
    """Loops, and paths that go around what a vote skips; not where only lanes that went separate ways go."""
    code = [
        "MOV R1, R2",
        "@P0 BRA 0x40",
        "FADD R1, R1, R2",
        "HMMA R4",
        "BRA.DIV UR5, 0x80",
        "LDGSTS.E [R1]",
        "@!P1 BRA 0x10",
        "EXIT",
        "NOP",
    ]
    listing = "".join(f"        /*{16 * i:04x}*/                   {text} ;       /* 0x0 */\n" for i, text in enumerate(code))
    (kernel,) = sass.kernels("\t\tFunction : _Z4testv\n" + listing)
    assert kernel.name == "test()"
    assert kernel.loops() == [(0x10, 0x60)]
    assert kernel.innermost("HMMA") == (0x10, 0x60)
    assert kernel.shortest(0x10, 0x60) == 4
    assert kernel.shortest(0x10, 0x60, through=kernel.where("HMMA")) == 6
    with pytest.raises(AssertionError, match="no path"):
        kernel.shortest(0x70, 0x10)


@pytest.mark.slow
def test_the_compiled_code_is_what_was_meant(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tensor cores and asynchronous copies are there, and no fused multiply-add in float64: philox.hpp says why."""
    compiler = nvcc()
    flags = ["-std=c++17", "-O3", "--fmad=false", "-ptx", "-arch=compute_80"]
    code = compiled(tmp_path_factory, [compiler, *flags, CUDA / "zones.cu"], "zones.ptx").read_text()
    integers = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    meant = ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", integers, "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global")
    for instruction in (*meant, "cp.async.ca.shared.global"):
        assert instruction in code
    assert "div.rn.f64" in code  # the softmax policy's keys
    assert "fma.rn.f64" not in code
    flags.remove("--fmad=false")  # the test of the test
    assert "fma.rn.f64" in compiled(tmp_path_factory, [compiler, *flags, CUDA / "zones.cu"], "fused.ptx").read_text()
