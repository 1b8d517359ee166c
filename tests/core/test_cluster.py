"""Clusters: presets are complete, TOML goes there and back, and impossible numbers are named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from elbowroom.core.cluster import Link, Rate
from elbowroom.core.cluster_file import PRESETS, parse_cluster, read_cluster
from elbowroom.core.errors import InputError
from tests.planning.facts import CPU, H20


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_their_sources(name: str) -> None:
    cluster = read_cluster(name)
    assert cluster.name == name
    assert cluster.num_devices == 8
    assert "data sheet" in " ".join(cluster.sources.values())
    assert parse_cluster(tomllib.loads(cluster.to_toml())) == cluster


def test_a_measured_machine_goes_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(CPU.to_toml())
    assert read_cluster(path) == CPU
    assert read_cluster(path).sources == CPU.sources


def test_a_product_takes_the_larger_of_bytes_and_flops() -> None:
    device = H20.device
    reading = 1e9 * 2 / (4.0e12 * 0.8)
    assert device.matmul_seconds(1, 1e9, 1e9, 2e9) == pytest.approx(reading)
    computing = 2 * 1000 * 1e9 / (148e12 * 0.7)
    assert device.matmul_seconds(1000, 1e9, 1e9, 2e9) == pytest.approx(computing)
    assert device.matmul_seconds(1, 1e9, 1e9, 1e9, is_fp8=True) == pytest.approx(reading / 2)


def test_measured_products_are_followed_between_and_beyond_points() -> None:
    device = CPU.device
    assert device.matmul_seconds(1, 7e9, 7e9, 14e9) == pytest.approx(1.0)
    assert device.matmul_seconds(256, 0.39e9, 0.39e9, 0.78e9) == pytest.approx(1.0)
    assert device.matmul_seconds(512, 0.39e9, 0.39e9, 0.78e9) == pytest.approx(2.0)
    between = (1 / 7 + (1 / 5 - 1 / 7) * 7 / 15) * 1e-9
    assert device.matmul_seconds(8, 1, 1, 2) == pytest.approx(between)


def test_all_reduce_takes_the_better_way() -> None:
    link = Link("x", 8, Rate(1e9), 1e-6)
    assert link.all_reduce_seconds(1e9, 1) == 0.0
    assert link.all_reduce_seconds(1, 8) == pytest.approx(1e-6 + 7e-9)
    assert link.all_reduce_seconds(1e9, 8) == pytest.approx(14 * (1e-6 + 1 / 8))


def test_the_nearest_link_that_joins_enough_is_taken() -> None:
    assert H20.link(8).name == "NVLink 4"
    with pytest.raises(InputError, match="no link that joins 9 devices"):
        H20.link(9)


def test_slowed_scales_every_time_of_a_device() -> None:
    slow = CPU.slowed(2.0).device
    assert slow.matmul_seconds(16, 1e9, 1e9, 2e9) == 2 * CPU.device.matmul_seconds(
        16, 1e9, 1e9, 2e9
    )
    assert slow.attention_bandwidth.achieved == CPU.device.attention_bandwidth.achieved / 2
    assert slow.iteration_seconds == 2 * CPU.device.iteration_seconds


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "this', "name = [", "not valid TOML"),
        ("num_devices = 2\n", "", "'num_devices' is missing"),
        ("memory = 8000000000", 'memory = "much"', "is not a size"),
        ("[device.flops]\npeak = 2", "[device.flops]\npeak = -2", "'peak' must be a positive"),
        ("layer_seconds = 0.0002", "layer_seconds = -1", "must be a number of seconds"),
        ("rows = 16", 'rows = "many"', "'<' not supported"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "bad.toml"
    text = CPU.to_toml()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=words):
        read_cluster(path)


def test_an_unknown_cluster_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="give one of h20-8, h100-8"):
        read_cluster("h300-8")
