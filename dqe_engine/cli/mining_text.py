"""What `dqe-mine` prints of mined negatives."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dqe_engine.zones.mined_folder import MiningManifest
from dqe_engine.zones.mining import QUANTILES, MinedNegatives, MiningSummary, summarise

SHOWN_PICKS = 6


def print_mined(manifest: MiningManifest, mined: MinedNegatives, rows: int) -> None:
    """Of a finished folder: what was mined, quantiles over the queries, and the first `rows` of them."""
    plan, zones, console = manifest.plan, manifest.plan.zones, Console()
    softmax = f", temperature {zones.temperature}" if zones.policy == "softmax" else ""
    print(f"gallery          {plan.items:,} items × {plan.tokens} × {plan.width}; backend {plan.backend}")
    applied = f" (Δ {manifest.resolved.lo:.4f} to {manifest.resolved.hi:.4f})" if manifest.resolved else ""
    print(
        f"zones            {zones.bounds} {zones.lo} to {zones.hi}{applied}; {plan.picks} picks, {zones.policy}{softmax}, seed {zones.seed}"
    )
    for name, count in plan.nonfinite.items():
        print(f"not finite       rows of {name}: {count:,}")
    print(f"queries          {plan.queries:,}")
    summary = summarise(mined)
    print_summary(summary, plan.picks)
    console.print(_quantile_table(summary))
    console.print(_row_table(mined, min(rows, plan.queries)))


def print_summary(summary: MiningSummary, picks: int) -> None:
    print(f"all {picks} picks".ljust(16), f"{summary.full:,} queries")
    print(f"empty mid zone   {summary.empty:,} queries")
    medians = ", ".join(f"{name} {summary.quantiles[name][3]:,}" for name in ("near", "mid", "easy") if name in summary.quantiles)
    print(f"zones, median    {medians or 'none'}")
    if "Δ of picks" in summary.quantiles:
        print(f"Δ of picks       {summary.quantiles['Δ of picks'][3]:.4f} (median)")


def _quantile_table(summary: MiningSummary) -> Table:
    table = Table(title="over the queries", title_justify="left")
    table.add_column("quantile", no_wrap=True)
    names = {0.0: "least", 0.5: "median", 1.0: "most"}
    for quantile in QUANTILES:
        table.add_column(names.get(quantile, f"{quantile:.0%}"), justify="right")
    for name, values in summary.quantiles.items():
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in values))
    return table


def _row_table(mined: MinedNegatives, rows: int) -> Table:
    table = Table(title=f"first {rows} queries", title_justify="left")
    for column in ("query", "target score", "near", "mid", "easy"):
        table.add_column(column, justify="right")
    table.add_column("picks (Δ)", overflow="fold")
    for row in range(rows):
        anchor = float(mined.anchor_scores[row])
        pairs = zip(mined.picks[row].tolist(), mined.pick_scores[row].tolist(), strict=True)
        picks = [f"{item} ({anchor - score:.4f})" for item, score in pairs if item >= 0]
        shown = "  ".join(picks[:SHOWN_PICKS]) + (f"  and {len(picks) - SHOWN_PICKS} more" if len(picks) > SHOWN_PICKS else "")
        table.add_row(str(row), f"{anchor:.4f}", *(f"{count:,}" for count in mined.counts[row].tolist()), shown or "none")
    return table
