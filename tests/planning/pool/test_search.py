"""Layouts: the paper's capacity ratios, what is enumerated, and why one is chosen."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from elbowroom.core.cluster import Cluster, Link, Rate
from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.workload import parse_lengths
from elbowroom.planning.pool.job import simulate_job
from elbowroom.planning.pool.layouts import (
    EngineLimits,
    enumerate_layouts,
    layout_budget,
    policy_of,
    pool_times,
    replica_limits,
    ship_threshold,
    why_not_run,
)
from elbowroom.planning.pool.search import choose, evaluate, job_seconds
from elbowroom.plans.pool import Layout
from tests.planning.facts import CPU, H20, H200, model

PAPER = EngineLimits(activation_bytes=4 * 10**9)
PAPER_BYTES = int(141e9 * 0.9)

RATIOS = {
    ("Qwen3-32B", 4, 2): 1.06,
    ("Qwen3-32B", 2, 4): 1.20,
    ("Qwen3-32B", 1, 8): 1.67,
    ("Llama-3.1-70B", 4, 2): 1.16,
    ("Llama-3.1-70B", 2, 4): 1.77,
    ("Qwen2.5-72B", 4, 2): 1.16,
    ("Qwen2.5-72B", 2, 4): 1.83,
}
"""KV tokens with the pool over without it (SiDP, its capacity table; ``papers.md``)."""


def kv_bytes(name: str, layout: Layout) -> int:
    return layout_budget(model(name), layout, PAPER_BYTES, PAPER).kv_bytes


@pytest.mark.parametrize(("where", "ratio"), RATIOS.items())
def test_capacity_ratios_of_the_paper(where: tuple[str, int, int], ratio: float) -> None:
    name, width, ranks = where
    pooled = kv_bytes(name, Layout(width, ranks, 1, "streamed", ranks - 1))
    alone = kv_bytes(name, Layout(width, 1, ranks, "none"))
    assert pooled / alone == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize("name", ["Llama-3.1-70B", "Qwen2.5-72B"])
def test_one_device_per_replica_only_with_the_pool(name: str) -> None:
    assert kv_bytes(name, Layout(1, 1, 8, "none")) < 0
    assert kv_bytes(name, Layout(1, 8, 1, "streamed", 7)) > 0


@pytest.mark.parametrize(("name", "slots_cost"), [("Qwen3-32B", 5.5e9), ("Llama-3.1-70B", 9.9e9)])
def test_what_whole_layer_slots_cost(name: str, slots_cost: float) -> None:
    """``papers.md``: d-1 slots at t1d8; two slots give all but 2/7 of it back."""
    budget = layout_budget(model(name), Layout(1, 8, 1, "streamed", 7), PAPER_BYTES, PAPER)
    assert budget.slot_bytes == pytest.approx(slots_cost, rel=0.01)
    fewer = layout_budget(model(name), Layout(1, 8, 1, "streamed", 2), PAPER_BYTES, PAPER)
    assert fewer.kv_bytes - budget.kv_bytes == pytest.approx(slots_cost * 5 / 7, rel=0.01)


def test_layouts_use_every_device() -> None:
    layouts = list(enumerate_layouts(model("Qwen3-32B"), H200))
    assert len(layouts) == len(set(layouts))
    assert {layout.num_devices for layout in layouts} == {8}
    assert {layout.pool for layout in layouts} == {"none", "streamed", "shipped"}
    assert Layout(8, 1, 1, "none") in layouts
    on_cpu = list(enumerate_layouts(model("Llama-3.1-8B"), CPU))
    assert {layout.pool for layout in on_cpu} == {"none", "mapped", "streamed", "shipped"}


def many_devices(num_devices: int) -> Cluster:
    far = Link("network", num_devices, Rate(50e9), 1e-5, network=True)
    return replace(H200, num_devices=num_devices, links=(*H200.links, far))


@pytest.mark.parametrize("num_devices", [8, 1024])
def test_choice(num_devices: int) -> None:
    rows = parse_lengths("4096:512x20000")
    choice = choose(model("Qwen3-32B"), many_devices(num_devices), rows, EngineLimits(1024))
    best = choice.best
    assert best is not None
    fitting = [candidate for candidate in choice.candidates if candidate.fits]
    assert best.seconds <= 1.01 * min(candidate.seconds for candidate in fitting)
    assert " KV tokens" in choice.reason
    pareto = choice.pareto()
    assert pareto[0].seconds == fitting[0].seconds
    for faster, slower in pairwise(pareto):
        assert faster.seconds <= slower.seconds
        assert faster.budget.num_kv_tokens < slower.budget.num_kv_tokens


def test_a_layout_is_out_with_its_number() -> None:
    facts, rows = model("Llama-3.1-70B"), parse_lengths("1024:512x100")
    layout = Layout(1, 1, 8, "none")
    out = evaluate(facts, H20, rows, EngineLimits(), layout)
    assert not out.fits
    needed = evaluate(
        facts,
        H20.with_memory(H20.device.usable_bytes + out.missing_bytes),
        rows,
        EngineLimits(),
        layout,
    )
    assert needed.fits, "so much more is enough"
    less = H20.with_memory(H20.device.usable_bytes + out.missing_bytes - 2**24)
    assert not evaluate(facts, less, rows, EngineLimits(), layout).fits, "and not much less"


def test_nothing_to_choose_from() -> None:
    with pytest.raises(MemoryPlanError, match="no layout is left"):
        choose(model("Qwen3-32B"), H20, parse_lengths("1:1"), EngineLimits(), [])


def test_samples_stand_for_long_jobs() -> None:
    """A job that is timed by two samples, against all of its rows."""
    facts = model("Qwen3-32B")
    layout, engine = Layout(2, 4, 1, "streamed", 3), EngineLimits(256)
    rows = parse_lengths("256-2048:64-1024x20000").longest_first()
    limits = replica_limits(layout_budget(facts, layout, H200.device.usable_bytes, engine), engine)
    guessed = job_seconds(facts, H200, rows, layout, limits)
    times = pool_times(facts, H200, layout)
    exact = simulate_job(times, limits, rows, layout.num_replicas, policy_of(layout)).seconds
    assert guessed == pytest.approx(exact, rel=0.1)


def test_mixtures_are_pooled_whole() -> None:
    """Where replicas map each other's memory, with experts in one piece, and not shipped."""
    facts = model("Qwen3-30B-A3B")
    for pool, slots in (("mapped", 0), ("streamed", 2), ("shipped", 2)):
        assert (why_not_run(facts, CPU, Layout(1, 2, 1, pool, slots)) is None) == (
            pool != "shipped"
        )
        assert why_not_run(facts, CPU, Layout(2, 2, 1, pool, slots)) is not None
        assert why_not_run(model("Llama-3.1-8B"), CPU, Layout(2, 2, 1, pool, slots)) is None
    assert ship_threshold(facts, CPU, Layout(1, 2, 1, "shipped", 2), 1000) > 0
