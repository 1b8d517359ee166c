"""Costs by hand, and the facts of real models that they rest on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.app.architecture import built_tensors
from elbowroom.core.cluster import Rate
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.model import ModelFacts, read_model
from elbowroom.planning.cost import Batch, CostModel
from tests.planning.facts import CONFIGS, CPU, H20, H200, model

FAST = Rate(1e30)
PARAMETERS = {
    "Qwen3-32B": 32.76e9,
    "Llama-3.1-8B": 8.03e9,
    "Llama-3.1-70B": 70.55e9,
    "Qwen2.5-72B": 72.71e9,
    "Mixtral-8x7B": 46.70e9,
    "Qwen3-30B-A3B": 30.53e9,
}
"""As the models' cards give them."""


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_configs_give_the_published_sizes(name: str, parameters: float) -> None:
    facts = model(name)
    counted = facts.rest.elements + sum(facts.ffn_elements)
    assert counted == pytest.approx(parameters, rel=1e-3)


def test_ffn_share_of_the_paper() -> None:
    """SiDP section 2: 77 % of Qwen3-32B is feed-forward."""
    facts = model("Qwen3-32B")
    share = sum(facts.ffn_elements) / (sum(facts.ffn_elements) + facts.rest.elements)
    assert share == pytest.approx(0.77, abs=0.005)


def test_a_token_of_a_mixture_meets_its_own_experts() -> None:
    """Qwen3-30B-A3B: 3.3 billion parameters are active, 8 of 128 experts per layer."""
    facts = model("Qwen3-30B-A3B")
    active = sum(facts.active_ffn_elements(layer) for layer in range(facts.num_layers))
    assert active + facts.rest.elements == pytest.approx(3.35e9, rel=0.01)
    assert facts.touched_ffn_elements(0, 1) == pytest.approx(facts.active_ffn_elements(0))
    assert facts.touched_ffn_elements(0, 10_000) == pytest.approx(facts.ffn_elements[0])


def test_terms_by_hand() -> None:
    """Qwen3-32B on one H20, 8 rows of 1,024 tokens."""
    facts, device = model("Qwen3-32B"), H20.device
    cost = CostModel(facts, H20).iteration(Batch(8, 8 * 1024))
    bandwidth, bandwidth_of_others = 4.0e12 * 0.8, 4.0e12 * 0.7
    assert cost.ffn == pytest.approx(64 * 3 * 5120 * 25600 * 2 / bandwidth)
    assert cost.projections == pytest.approx(64 * 2 * 5120 * (64 + 8) * 128 * 2 / bandwidth)
    assert cost.head == pytest.approx(151936 * 5120 * 2 / bandwidth)
    kv_bytes = 2 * 64 * 8 * 128 * 2 * 8 * 1024
    assert cost.kv_read == pytest.approx(kv_bytes / bandwidth_of_others)
    assert cost.collectives == 0
    small = 8 * (12 * 5120 + 3 * 25600) * 2 / bandwidth_of_others
    assert cost.layers == pytest.approx(64 * (device.layer_seconds + small))
    assert cost.engine == pytest.approx(device.iteration_seconds + 8 * device.row_seconds)
    assert cost.total == pytest.approx(sum(cost))


def test_tensor_parallel_divides_reading_and_adds_collectives() -> None:
    facts, batch = model("Qwen3-32B"), Batch(8, 8 * 1024)
    one, four = CostModel(facts, H20).iteration(batch), CostModel(facts, H20, 4).iteration(batch)
    assert four.ffn == pytest.approx(one.ffn / 4)
    assert four.kv_read == pytest.approx(one.kv_read / 4)
    per_reduce = H20.link(4).all_reduce_seconds(8 * 5120 * 2, 4)
    assert four.collectives == pytest.approx(2 * 64 * per_reduce)


def test_more_work_never_takes_less_time() -> None:
    for cluster in (CPU, H200):
        cost = CostModel(model("Llama-3.1-8B"), cluster)
        times = [cost.iteration(Batch(rows, rows * 512)).total for rows in range(1, 600, 7)]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("cluster", "tokens"), [("h20-8", 330), ("h200-8", 2200), ("b200-8", 2500)]
)
def test_tokens_at_which_an_ffn_hides_its_own_fetch(cluster: str, tokens: int) -> None:
    """``papers.md``: FLOPS over link bandwidth, in bf16, at peak rates."""
    facts = read_cluster(cluster)
    peak = facts.device.flops.peak / facts.links[0].bandwidth.peak
    assert peak == pytest.approx(tokens, rel=0.01)
    # The cost model says the same, with what is achieved instead of peaks.
    cost, layer = CostModel(model("Qwen3-32B"), facts), 0
    link = facts.links[0]
    fetch = cost.fetch_layer_seconds(layer, 2) - link.latency_seconds
    achieved = facts.device.flops.achieved / link.bandwidth.achieved
    assert cost.ffn_layer_seconds(layer, achieved) == pytest.approx(fetch)


@pytest.mark.parametrize("name", ["h20-8", "h100-8", "b200-8", "l40s-8", "mi300x-8"])
def test_fetching_is_what_the_link_takes(name: str) -> None:
    facts, cluster = model("Llama-3.1-70B"), read_cluster(name)
    layer_bytes = 3 * 8192 * 28672 * 2
    link = cluster.links[0]
    by_hand = 80 * 7 / 8 * (layer_bytes / link.bandwidth.achieved + link.latency_seconds)
    assert CostModel(facts, cluster).fetch_seconds(8) == pytest.approx(by_hand)
    assert CostModel(facts, cluster).fetch_seconds(1) == 0


def test_fp8_weights_halve_what_is_fetched() -> None:
    facts = model("Llama-3.1-70B")
    fp8 = replace(facts, weight_dtype="fp8")
    whole, half = CostModel(facts, H200).fetch_seconds(8), CostModel(fp8, H200).fetch_seconds(8)
    assert half == pytest.approx(whole / 2, rel=0.01)
    assert replace(facts, kv_dtype="fp8").kv_bytes_per_token() * 2 == facts.kv_bytes_per_token()


def _of_config(name: str, folder: Path) -> ModelFacts:
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return read_model(folder, build=built_tensors)


def test_a_window_is_read_and_no_more(tmp_path: Path) -> None:
    """Half of Gemma 2's layers attend to 4,096 tokens."""
    cost = CostModel(_of_config("gemma-2-27b", tmp_path), H200)
    bandwidth = H200.device.attention_bandwidth.achieved
    layer = 2 * 16 * 128 * 2
    short = cost.kv_read_seconds(10 * 1000.0, 10)
    assert short == pytest.approx(46 * layer * 10_000 / bandwidth)
    long = cost.kv_read_seconds(10 * 8000.0, 10)
    assert long == pytest.approx(23 * layer * 10 * (8000 + 4096) / bandwidth)


def test_latents_are_read_whole_by_every_device(tmp_path: Path) -> None:
    """DeepSeek-V3 keeps 576 numbers a token, and multiplies them with 128 queries."""
    facts = _of_config("deepseek-v3", tmp_path)
    reading = 61 * 576 * 2 / H200.device.attention_bandwidth.achieved
    computing = 61 * 2 * 128 * (576 + 512) / H200.device.attention_flops.achieved
    assert CostModel(facts, H200).kv_read_seconds(1.0, 1) == max(reading, computing)
    assert CostModel(facts, H200, 8).kv_read_seconds(1.0, 1) == pytest.approx(
        max(reading, computing / 8)
    )


def test_a_tile_of_an_expert_takes_as_long_with_few_rows(tmp_path: Path) -> None:
    """64 rows are the smallest tile; 128 experts with 4 of each token have 32 from 1,024."""
    facts = _of_config("gpt-oss-120b", tmp_path)
    cost = CostModel(facts, replace(H200, device=replace(H200.device, memory_bandwidth=FAST)))
    assert cost.ffn_layer_seconds(0, 1024) == pytest.approx(cost.ffn_layer_seconds(0, 2048), 0.01)
    assert cost.ffn_layer_seconds(0, 4096) == pytest.approx(
        2 * cost.ffn_layer_seconds(0, 2048), 0.01
    )


def test_divided_experts_read_less_and_send_rows(tmp_path: Path) -> None:
    facts = _of_config("deepseek-v3", tmp_path)
    alone, divided = CostModel(facts, H200), CostModel(facts, H200, expert_ranks=8)
    batch = Batch(32, 32 * 1000)
    assert divided.ffn_seconds(32) < alone.ffn_seconds(32)
    assert divided.iteration(batch).collectives > alone.iteration(batch).collectives == 0


def test_stages_work_on_parts_of_the_rows() -> None:
    """All rows are done once in the time that one part takes through every stage."""
    nodes = read_cluster("h200-2x8")
    alone = CostModel(model("Llama-3.1-70B"), nodes, 8)
    staged = replace(alone, stages=2)
    half = alone.iteration(Batch(64, 64 * 1000))
    both = staged.iteration(Batch(128, 128 * 1000))
    assert both.ffn == half.ffn
    assert both.kv_read == half.kv_read
    assert both.collectives > half.collectives
