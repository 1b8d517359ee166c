"""Claim: the simulator shows the SiDP paper's mechanisms from first principles, and what lies past.

    python -m bench.sidp_reproduction

No device is needed. Prints the numbers of ``docs/sidp-reproduction.md``, writes its figures to
``docs/figures`` and keeps the numbers in ``bench/results``. Rates are the presets' (peaks from data
sheets, achieved fractions assumed). Memory is nominal, as the paper counts it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt

from bench.common import ROOT, write_result
from bench.figures import label, save
from elbowroom.core.cluster import Cluster, Link, Rate
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.model import ModelFacts, read_model
from elbowroom.core.workload import Workload, parse_lengths
from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.pool.job import JobOutcome, Policy, ReplicaLimits, simulate_job
from elbowroom.planning.pool.layouts import EngineLimits, layout_budget, replica_limits
from elbowroom.planning.pool.modes import PoolTimes
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.planning.pool.timeline import link_share, simulate_pool
from elbowroom.plans.pool import FetchOrder, Layout

MODELS = ROOT / "tests" / "data" / "models"


def nominal(name: str, memory_bytes: float) -> Cluster:
    """A preset with nominal memory: the capacity table of SiDP fits 141e9 bytes at 0.9."""
    cluster = read_cluster(name)
    return replace(cluster, device=replace(cluster.device, memory_bytes=int(memory_bytes)))


H20, H200, B200 = nominal("h20-8", 96e9), nominal("h200-8", 141e9), nominal("b200-8", 180e9)
ENGINE = EngineLimits(max_num_seqs=1024)
LONG, SHORT = "4096:256-768x3000", "1024:256-768x6000"


def main() -> None:
    qwen, llama = model("Qwen3-32B"), model("Llama-3.1-70B")
    result = {
        "peak_shifting": peak_shifting(qwen),
        "stream_or_ship": stream_or_ship(llama),
        "share_streamed": share_streamed(qwen),
        "hiding_tokens": hiding_tokens(),
        "pool_over_none": pool_over_none(qwen),
        "pool_over_none_when_tight": pool_over_none_when_tight(qwen),
        "slots_and_copies": slots_and_copies(qwen),
        "mode_choice": mode_choice(qwen),
        "links": links(qwen),
        "weights": weights(),
    }
    write_result("sidp_reproduction", result)


def model(name: str) -> ModelFacts:
    return read_model(MODELS / name)


def peak_shifting(facts: ModelFacts) -> dict[str, Any]:
    """Qwen3-32B on H20 at 1K; the paper has 2.5x at DP4, 3.4x at DP8."""
    cost, batches = CostModel(facts, H20), (4, 8, 16, 32, 64, 96, 128, 192, 256)
    kinds: dict[str, tuple[FetchOrder, int, int | None]] = {
        "shifted, d-1 slots, a copy at a time (paper)": ("peak-shift", -1, 1),
        "shifted, d slots, a copy at a time": ("peak-shift", 0, 1),
        "shifted, d-1 slots, d-1 copies at once": ("peak-shift", -1, None),
        "in order, d-1 slots, d-1 copies at once": ("in-order", -1, None),
    }
    gains: dict[str, dict[str, list[float]]] = {}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for ax, ranks in zip(axes, (4, 8), strict=True):
        meeting = [pool_seconds(cost, ranks, b, "in-order", ranks - 1, 1) for b in batches]
        of_ranks = {}
        for name, (order, more, copies) in kinds.items():
            shifted = [pool_seconds(cost, ranks, b, order, ranks + more, copies) for b in batches]
            of_ranks[name] = [m / s for m, s in zip(meeting, shifted, strict=True)]
            ax.plot(batches, of_ranks[name], marker="o", markersize=3, label=name)
        ax.axhline({4: 2.5, 8: 3.4}[ranks], color="grey", linestyle="--", label="paper")
        label(ax, f"DP{ranks}", "rows per replica", "times as fast as no shifting")
        gains[f"DP{ranks}"] = of_ranks
    axes[0].legend(fontsize=7)
    save(figure, "peak-shifting")
    return {"batches": batches, "gains": gains}


def pool_seconds(
    cost: CostModel, ranks: int, rows: int, order: FetchOrder, slots: int, copies: int | None
) -> float:
    sizes = cost.model.ffn_bytes()
    shares = plan_shares(sizes, ranks, "streamed", slots, order, sizes[0] // 8)
    batches = [Batch(rows, rows * 1024)] * ranks
    return simulate_pool(cost, shares, batches, copies_at_once=copies).iteration_seconds


def stream_or_ship(facts: ModelFacts) -> dict[str, Any]:
    """Llama-70B, TP2/DP2, H20, 1K; the paper ships up to 32 and streams for free at 128."""
    batches = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
    pool = PoolTimes(CostModel(facts, H20, 2), 2)
    times = [pool.times(Batch(rows, rows * 1024)) for rows in batches]
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in ("local", "streamed", "shipped", "mixed"):
        ax.plot(batches, [getattr(t, name) * 1e3 for t in times], label=name)
    ax.axvline(pool.threshold_batch(1024) or 0, color="grey", linestyle="--", label="B_th")
    ax.set_xscale("log", base=2)
    label(ax, "Llama-3.1-70B, t2d2, H20, 1K", "rows per replica", "ms per iteration")
    ax.legend(fontsize=7)
    save(figure, "stream-or-ship")
    thresholds = {
        cluster.name: {
            "stream_no_slower_than_ship": other.threshold_batch(1024),
            "compute_hides_fetch": other.hiding_batch(1024),
        }
        for cluster in (H20, H200, B200)
        for other in [PoolTimes(CostModel(facts, cluster, 2), 2)]
    }
    milliseconds = {
        str(rows): {name: round(value * 1e3, 2) for name, value in t._asdict().items()}
        for rows, t in zip(batches, times, strict=True)
    }
    return {"ms": milliseconds, "thresholds": thresholds}


def share_streamed(facts: ModelFacts) -> dict[str, float]:
    """Share of streamed iterations of a job; the paper has over 90 %."""
    shares = {}
    figure, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for name, lengths in (("1K", SHORT), ("4K", LONG)):
        job = run(facts, H20, Layout(2, 4, 1, "streamed", 3), "per-replica", rows(lengths))
        shares[name] = job.mode_share("streamed")
        first = [segment for segment in job.segments if segment.replica == 0]
        ends = [segment.end / job.seconds for segment in first]
        ax.step(ends, [segment.num_rows for segment in first], label=f"{name}, rows of replica 0")
    label(ax, "Qwen3-32B, t2d4, H20", "part of the job", "rows at once")
    ax.legend(fontsize=7)
    save(figure, "share-streamed")
    return shares


def hiding_tokens() -> dict[str, float]:
    """Tokens of an iteration at which an FFN takes as long as its own fetch, at peak rates."""
    return {c.name: c.device.flops.peak / c.links[0].bandwidth.peak for c in (H20, H200, B200)}


def pool_over_none(facts: ModelFacts) -> dict[str, Any]:
    """Tokens per second over the same replicas without a pool. The paper: about equal at 1K,
    1.3-1.5x at 4K, more at 0.6 of the memory.
    """
    ratios = {}
    for cluster in (H20, H200, B200):
        for fraction in (0.9, 0.6):
            device = replace(cluster.device, memory_fraction=fraction)
            small = replace(cluster, device=device)
            for name, lengths in (("1K", SHORT), ("4K", LONG)):
                job = rows(lengths)
                alone = run(facts, small, Layout(2, 1, 4, "none"), "local", job)
                pool = Layout(2, 4, 1, "streamed", 3)
                of_pool = {p: run(facts, small, pool, p, job) for p in ("streamed", "per-replica")}
                ratios[f"{cluster.name} {fraction} {name}"] = {
                    "streamed": alone.seconds / of_pool["streamed"].seconds,
                    "shipped": alone.seconds / of_pool["per-replica"].seconds,
                }
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for offset, kind in ((-0.2, "streamed"), (0.2, "shipped")):
        places = [index + offset for index in range(len(ratios))]
        ax.bar(places, [ratio[kind] for ratio in ratios.values()], width=0.4, label=kind)
    ax.set_xticks(range(len(ratios)), list(ratios), rotation=60, ha="right", fontsize=7)
    ax.axhline(1.0, color="grey", linestyle="--")
    label(ax, "Qwen3-32B, TP2/DP4: with the pool over without", "", "times as fast")
    ax.legend(fontsize=7)
    save(figure, "pool-over-none")
    return ratios


def pool_over_none_when_tight(facts: ModelFacts) -> dict[str, float]:
    """One device per replica, 0.6 of its memory: full copies leave few rows."""
    small = replace(H200, device=replace(H200.device, memory_fraction=0.6))
    ratios = {}
    for lengths in ("4096:256-768x1000", "512:3072-4096x1000"):
        alone = run(facts, small, Layout(1, 1, 8, "none"), "local", rows(lengths))
        pool = run(facts, small, Layout(1, 8, 1, "streamed", 7), "per-replica", rows(lengths))
        ratios[lengths] = alone.seconds / pool.seconds
    return ratios


def slots_and_copies(facts: ModelFacts) -> dict[str, Any]:
    """Share of its link that a reader gets, by slots and copies at once; and what slots cost."""
    cost = CostModel(facts, H20)
    layer = facts.ffn_bytes()[0]
    table: dict[str, Any] = {}
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for ranks in (4, 8):
        counts = range(1, ranks + 1)
        for name, order, copies in (
            ("shifted, one copy at a time", "peak-shift", 1),
            ("shifted, all slots at once", "peak-shift", None),
            ("sliced, one copy at a time", "sliced", 1),
            ("in order, all slots at once", "in-order", None),
        ):
            shares = [share(cost, ranks, slots, order, copies) for slots in counts]
            table[f"d={ranks}, {name}"] = shares
            style = "-" if ranks == 8 else ":"
            ax.plot(counts, shares, style, marker="o", markersize=3, label=f"d={ranks}, {name}")
    label(ax, "Qwen3-32B, t1, fetches alone", "slots", "share of the link")
    ax.legend(fontsize=6)
    save(figure, "slots-and-copies")
    return {"slot_gigabytes": layer / 1e9, "link_share": table}


def share(cost: CostModel, ranks: int, slots: int, order: FetchOrder, copies: int | None) -> float:
    if order != "sliced":
        return link_share(cost, ranks, slots, order, copies)
    seconds = pool_seconds(cost, ranks, 1, "sliced", slots, copies)
    return cost.fetch_seconds(ranks) / seconds


def mode_choice(facts: ModelFacts) -> dict[str, dict[str, float]]:
    """Output tokens per second by who chooses; equal replicas, and one at half the speed."""
    layout = Layout(1, 4, 1, "streamed", 3)
    policies: tuple[Policy, ...] = ("streamed", "shipped", "group", "per-replica", "mixed")
    cases = {
        "large batches": ("1024:256-768x4000", None),
        "small batches": ("1024:64-1536x160", None),
        "a slow replica": ("1024:64-1536x160", (1.0, 1.0, 1.0, 0.5)),
    }
    table = {
        name: {
            policy: run(facts, H20, layout, policy, rows(lengths), speeds).tokens_per_second
            for policy in policies
        }
        for name, (lengths, speeds) in cases.items()
    }
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for index, policy in enumerate(policies):
        values = [row[policy] / row["group"] for row in table.values()]
        ax.bar([at + 0.16 * index for at in range(len(table))], values, width=0.16, label=policy)
    ax.set_xticks([at + 0.32 for at in range(len(table))], list(table))
    label(ax, "Qwen3-32B, t1d4, H20", "", "times as fast as group-wide")
    ax.legend(fontsize=7)
    save(figure, "mode-choice")
    return table


def links(facts: ModelFacts) -> dict[str, dict[str, Any]]:
    """The pool over other links: thresholds, and speed over the same replicas without a pool."""
    job, layout = rows("2048:256-768x2000"), Layout(1, 4, 1, "streamed", 3)
    alone = run(facts, H200, Layout(1, 1, 4, "none"), "local", job).seconds
    table = {}
    for name, bandwidth, latency in (
        ("NVLink 4, 450 GB/s", 450e9, 8e-6),
        ("PCIe 5 x16, 64 GB/s", 64e9, 10e-6),
        ("400 Gbit/s, 50 GB/s", 50e9, 15e-6),
        ("100 GbE, 12.5 GB/s", 12.5e9, 30e-6),
    ):
        link = Link(name, 8, Rate(bandwidth, 0.8), latency)
        cluster = replace(H200, links=(link,))
        pool = PoolTimes(CostModel(facts, cluster), 4, 3)
        jobs = {
            p: run(facts, cluster, layout, p, job) for p in ("streamed", "per-replica", "mixed")
        }
        table[name] = {
            "B_th": pool.threshold_batch(2304),
            **{policy: alone / outcome.seconds for policy, outcome in jobs.items()},
        }
    return table


def weights() -> dict[str, dict[str, Any]]:
    """FP8 and mixtures on H200: gigabytes fetched per iteration, thresholds, speed of the pool."""
    dense = model("Llama-3.1-70B")
    table = {}
    for name, facts, width in (
        ("Llama-3.1-70B bf16", dense, 2),
        ("Llama-3.1-70B fp8", replace(dense, weight_dtype="fp8"), 2),
        ("Mixtral-8x7B", model("Mixtral-8x7B"), 1),
        ("Qwen3-30B-A3B", model("Qwen3-30B-A3B"), 1),
    ):
        pool = PoolTimes(CostModel(facts, H200, width), 4, 3)
        job, context = rows("2048:256-768x2000"), 2304
        alone = run(facts, H200, Layout(width, 1, 4, "none"), "local", job)
        shared = run(facts, H200, Layout(width, 4, 1, "streamed", 3), "per-replica", job)
        table[name] = {
            "fetched_gigabytes": sum(facts.ffn_bytes()) * 0.75 / width / 1e9,
            "B_th": pool.threshold_batch(context),
            "B_hide": pool.hiding_batch(context),
            "WaS+CaS over none": alone.seconds / shared.seconds,
        }
    return table


def rows(lengths: str) -> Workload:
    return parse_lengths(lengths).longest_first()


def run(
    facts: ModelFacts,
    cluster: Cluster,
    layout: Layout,
    policy: Policy,
    job: Workload,
    speeds: tuple[float, ...] | None = None,
) -> JobOutcome:
    budget = layout_budget(facts, layout, cluster.device.usable_bytes, ENGINE)
    limits: ReplicaLimits = replica_limits(budget, ENGINE)
    cost = CostModel(facts, cluster, layout.tensor_parallel)
    times = PoolTimes(cost, layout.num_ranks, layout.num_slots)
    return simulate_job(times, limits, job, layout.num_replicas, policy, speeds)


if __name__ == "__main__":
    main()
