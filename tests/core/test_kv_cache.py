"""Costs of rows in a cache whose layers keep different parts of them."""

from __future__ import annotations

import pytest

from elbowroom.core.kv_cache import AttentionLayers, KvGroups, kv_groups


@pytest.mark.parametrize(
    ("full", "windowed", "groups"),
    [
        (4, 0, (4, (0,))),
        (0, 3, (3, (64,))),
        (10, 20, (10, (0, 64, 64))),
        (10, 52, (10, (0, 64, 64, 64, 64, 64, 64))),  # the last is padded
        (12, 13, (13, (0, 64))),  # nearly equal: padded rather than split
    ],
)
def test_groups_are_those_of_vllm(
    full: int, windowed: int, groups: tuple[int, tuple[int, ...]]
) -> None:
    assert AttentionLayers((0,) * full + (64,) * windowed, 8, 1).groups() == groups


def test_a_row_costs_its_tokens_where_every_layer_keeps_them() -> None:
    assert KvGroups().row_tokens(100) == 100
    assert KvGroups().row_tokens(100, 32) == 128


def test_a_window_keeps_what_is_computed_too_and_a_block_more() -> None:
    groups = kv_groups((64, 0), tokens_in_flight=512)
    assert groups.most == (575, 0)
    assert groups.row_tokens(1024, 32) == ((18 + 1) + 32) * 32 // 2
    assert groups.row_tokens(32, 32) == (1 + 1 + 1) * 32 // 2


@pytest.mark.parametrize("most", [(0,), (64, 0), (64, 64, 0)])
@pytest.mark.parametrize("room", [0, 31, 32, 1000, 5000])
def test_the_longest_row_is_the_longest_that_fits(most: tuple[int, ...], room: int) -> None:
    groups = KvGroups(most)
    longest = groups.longest_row(room, 32, 2048)
    costs = [groups.row_tokens(tokens, 32) for tokens in range(1, 2049)]
    assert longest == sum(cost <= room for cost in costs)
