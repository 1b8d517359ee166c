"""Clusters: times of products and transfers, and which devices reach each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elbowroom.core.cluster import Link, Rate
from elbowroom.core.errors import InputError
from tests.planning.facts import CPU, H20


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
    assert device.matmul_seconds(8, 0, 0, 0) == 0, "of a layer without such a matrix"


def test_all_reduce_takes_the_better_way() -> None:
    link = Link("x", 8, Rate(1e9), 1e-6)
    assert link.all_reduce_seconds(1e9, 1) == 0.0
    assert link.all_reduce_seconds(1, 8) == pytest.approx(1e-6 + 7e-9)
    assert link.all_reduce_seconds(1e9, 8) == pytest.approx(14 * (1e-6 + 1 / 8))


def test_in_a_mesh_all_links_of_a_device_reduce_at_once() -> None:
    mesh = Link("x", 8, Rate(1e9), 1e-6, mesh=True)
    assert mesh.all_reduce_seconds(1e9, 2) == pytest.approx(1e-6 + 1)
    assert mesh.all_reduce_seconds(1, 8) == pytest.approx(1e-6 + 1e-9)
    assert mesh.all_reduce_seconds(1e9, 8) == pytest.approx(14 * (1e-6 + 1 / 56))
    assert mesh.transfer_seconds(1e9) == pytest.approx(1e-6 + 1)


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


def test_a_network_leads_out_of_a_node() -> None:
    near, far = Link("x", 4, Rate(1e9), 0.0), Link("y", 16, Rate(1e8), 0.0, network=True)
    assert replace(H20, links=(near, far)).node_devices == 4
    assert replace(H20, links=(far,)).node_devices == 1
    assert replace(H20, links=()).node_devices == 1
