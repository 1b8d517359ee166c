"""Rows that convolutions take from neighbours: how many messages and bytes, both ways."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from elbowroom.core.windows import Window, exchange
from elbowroom.grid.transport import Counted
from elbowroom.grid.windowed import conv
from tests.grid.test_windowed import plain_conv
from tests.grid.twins import (
    check,
    layout_of,
    normal,
    started,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def draw_halo(rng: random.Random, case: int) -> tuple[Window, list[int]]:
    kernel, stride = rng.choice([1, 3, 5, 7, 11]), rng.choice([1, 2, 4])
    dilation = rng.randint(1, 2)
    reach = dilation * (kernel - 1) + 1
    parts = [[4, 1], [2, 2], [1, 4], [2, 1], [3, 2], [2, 4]][case % 6]
    return Window(kernel, stride, (reach - 1) // 2, (reach - 1) // 2, dilation), parts


@pytest.mark.parametrize("seed", range(2))
def test_halos_are_what_the_closed_form_says(seed: int) -> None:
    """Messages and bytes, both ways: as ``exchange`` counts them, and by a formula.

    Rows of the second dimension are sent with the rows of the first that are there by then.
    """
    rng, seen = started(40 + seed), Counter[str]()
    for case in range(60):
        window, parts = draw_halo(rng, case)
        batch = 2 if case % 3 == 0 else 1
        # Strides divide the shares, and no halo is wider than a share.
        share = 4 * (1 + window.reach // 4)
        sizes = [share * count for count in parts]
        layout = layout_of([batch, 1, *parts], replicas=rng.choice([1, 1, 2]))
        x = normal(3, 2, *sizes)
        result = check(
            lambda part, own, channel: conv(part, own[0], None, [window] * 2, channel),  # noqa: B023
            lambda whole, own: plain_conv(whole, own[0], None, [window] * 2),  # noqa: B023
            layout,
            x,
            [normal(1, 2, window.kernel, window.kernel)],
        )
        copies = layout.num_workers // (batch * parts[0] * parts[1])
        counted = by_exchange(window, sizes, parts, batch)
        formula = by_formula(window, sizes, parts, batch)
        assert counted == formula, (window, sizes, parts)
        wanted = Counted(formula.messages * copies, formula.num_bytes * copies)
        for way in ("forward", "backward"):
            assert result.sent.get(way, Counted()) == wanted, (way, window, parts)  # type: ignore[call-overload]
        seen["both axes"] += parts[0] > 1 and parts[1] > 1
        seen["silent"] += wanted.messages == 0
    assert seen["both axes"] >= 20 and 3 <= seen["silent"] <= 20, seen


def by_exchange(window: Window, sizes: list[int], parts: list[int], batch: int) -> Counted:
    """What moves, row by row: 2 features of 3 samples, 8 bytes each."""
    first, second = (exchange(window, *each) for each in zip(sizes, parts, strict=True))
    messages = rows = 0
    for place in range(parts[0]):
        for column in range(parts[1]):
            for other in range(parts[0]):
                taken = sum(each.size for each in first.taken(other, place))
                if taken and other != place:
                    messages += batch
                    rows += taken * second.own[column].size
            there = first.num_wanted(place)
            for other in range(parts[1]):
                taken = sum(each.size for each in second.taken(other, column))
                if taken and other != column:
                    messages += batch
                    rows += taken * there
    return Counted(messages, rows * 3 * 2 * 8)


def by_formula(window: Window, sizes: list[int], parts: list[int], batch: int) -> Counted:
    below = window.before
    above = max(0, window.reach - window.stride - window.before)
    sides = bool(below) + bool(above)
    messages = batch * sides * ((parts[0] - 1) * parts[1] + (parts[1] - 1) * parts[0])
    rows = (parts[0] - 1) * (below + above) * sizes[1]
    # Where all rows are read, that is sizes[0] and (parts - 1) halos.
    there = sizes[0] + parts[0] * (window.reach - window.stride) - below - above
    rows += (parts[1] - 1) * (below + above) * there
    return Counted(messages, rows * 3 * 2 * 8)
