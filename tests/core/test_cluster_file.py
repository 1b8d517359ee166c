"""Cluster TOML: presets are complete and named by count, and impossible numbers are named."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from elbowroom.core.cluster import Cluster
from elbowroom.core.cluster_file import DEVICES, is_preset, parse_cluster, read_cluster
from elbowroom.core.errors import InputError
from tests.planning.facts import CPU

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cluster-toml.md"
FILES = resources.files("elbowroom.core") / "clusters"


def node(device: str) -> Cluster:
    return parse_cluster(tomllib.loads((FILES / f"{device}.toml").read_text()))


def test_every_device_has_its_file() -> None:
    assert sorted(path.name for path in FILES.iterdir()) == sorted(f"{d}.toml" for d in DEVICES)


@pytest.mark.parametrize("name", DEVICES)
def test_presets_name_a_source_of_every_number(name: str) -> None:
    cluster = node(name)
    assert cluster.name == name
    named = {key for keys in cluster.sources for key in keys.split(", ")}
    assert named == {
        *("memory", "memory_fraction", "flops", "flops_fp8", "memory_bandwidth", "fractions"),
        *("layer_seconds", "iteration_seconds", "row_seconds", "links.latency_seconds"),
        *(f"links.{link.name}" for link in cluster.links),
    }
    assert all(cluster.sources.values())
    assert parse_cluster(tomllib.loads(cluster.to_toml())) == cluster


@pytest.mark.parametrize("name", DEVICES)
def test_presets_are_sane(name: str) -> None:
    device, links = node(name).device, node(name).links
    assert 20 * 2**30 < device.memory_bytes < 200 * 2**30
    assert device.memory_bytes % 2**20 == 0  # as drivers report it
    ampere = name.startswith("a10") or name == "rtx3090"
    assert device.flops_fp8.peak / device.flops.peak == pytest.approx(1 if ampere else 2, rel=0.03)
    assert 30 < device.flops.peak / device.memory_bandwidth.peak < 450
    fractions = (device.flops, device.flops_fp8, device.memory_bandwidth, links[0].bandwidth)
    assert [rate.fraction for rate in fractions] == [0.7, 0.6, 0.8, 0.8]
    speeds = [link.bandwidth.peak for link in links]
    assert speeds == sorted(speeds, reverse=True)
    assert device.memory_bandwidth.peak > 4 * speeds[0]
    assert [link.network for link in links] == [
        link.num_devices > node(name).num_devices for link in links
    ]


def test_presets_stand_to_one_another_as_the_devices_do() -> None:
    devices = {name: node(name).device for name in DEVICES}
    for better, worse in [
        *(("h200", "h100"), ("b200", "h200"), ("gb200", "b200")),
        *(("h100-nvl", "h100-pcie"), ("h100", "a100-80"), ("a100-80", "a100-40")),
        *(("a100-80", "a10"), ("l40s", "l4"), ("rtx5090", "rtx4090"), ("rtx4090", "rtx3090")),
        *(("rtx-pro-6000", "rtx5090"), ("mi300x", "h200")),
    ]:
        assert devices[better].flops.peak >= devices[worse].flops.peak, better
        assert devices[better].memory_bandwidth.peak >= 0.99 * devices[worse].memory_bandwidth.peak
    assert devices["h20"].memory_bytes == devices["gh200"].memory_bytes
    assert devices["h100"].memory_bytes == 81_559 * 2**20


def test_existing_presets_keep_their_rates() -> None:
    for name, flops, link in [
        *(("h20-8", 148e12, 450e9), ("h100-8", 989e12, 450e9), ("h200-8", 989e12, 450e9)),
        *(("b200-8", 2250e12, 900e9), ("a100-80-8", 312e12, 300e9)),
    ]:
        cluster = read_cluster(name)
        assert (cluster.name, cluster.num_devices) == (name, 8)
        assert (cluster.device.flops.peak, cluster.links[0].bandwidth.peak) == (flops, link)
        assert [link.num_devices for link in cluster.links] == [8]


@pytest.mark.parametrize(
    ("name", "num_devices", "node_devices", "links"),
    [
        ("h100-1", 1, 1, []),
        ("h100-3", 3, 3, [3]),
        ("h100-2x8", 16, 8, [8, 16]),
        ("h100-4x1", 4, 1, [4]),
        ("h100-nvl-2", 2, 2, [2]),
        ("h100-nvl-4", 4, 4, [2, 4]),
        ("gb200-4", 4, 4, [4]),
        ("gb200-18x4", 72, 4, [4, 72]),
        ("gb200-20x4", 80, 4, [4, 72, 80]),
        ("rtx4090-2x4", 8, 4, [4, 8]),
    ],
)
def test_names_say_how_many(
    name: str, num_devices: int, node_devices: int, links: list[int]
) -> None:
    assert is_preset(name)
    cluster = read_cluster(name)
    assert (cluster.name, cluster.num_devices) == (name, num_devices)
    assert cluster.node_devices == node_devices
    assert [link.num_devices for link in cluster.links] == links


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h300-8", "perhaps h.00-8: give DEVICE-N.* rtx4090"),
        ("a100-8", "perhaps a100-80-8"),
        ("H100-8", "perhaps h100-8"),
        ("h100", "perhaps h100-1"),
        ("rtx-pro-6000", "perhaps rtx-pro-6000-1"),
        ("quux", "'quux': give DEVICE-N"),
        ("h100-9", "h100-2x8"),
        ("h100-0", "1 to 8 devices"),
        ("gb200-8", "gb200-2x4"),
        ("h100-0x8", "1 to 128 nodes"),
        ("h100-129x8", "1 to 128 nodes"),
    ],
)
def test_names_that_are_no_cluster(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_cluster(name)


def test_links_but_the_nearest_lead_out_of_a_node() -> None:
    table = tomllib.loads(read_cluster("h100-nvl-8").to_toml())
    for link in table["links"]:
        del link["network"]
    assert parse_cluster(table).node_devices == 2


def test_the_page_shows_files_that_can_be_read() -> None:
    shown = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [parse_cluster(tomllib.loads(text)).name for text in shown] == ["h200", "our-cards"]


def test_a_measured_machine_goes_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(CPU.to_toml())
    assert read_cluster(path) == CPU
    assert read_cluster(path).sources == CPU.sources


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
