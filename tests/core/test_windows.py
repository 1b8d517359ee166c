"""Index arithmetic of one dimension against what its words say, one row after the other."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from elbowroom.core.windows import (
    PADDING,
    AxisWindow,
    Interval,
    Resize,
    TransposedWindow,
    Window,
    bounds,
    exchange,
    intervals,
    part_of,
)

SIZES = st.integers(1, 40)
PARTS = st.integers(1, 9)
WINDOWS = st.builds(
    Window,
    kernel=st.integers(1, 11),
    stride=st.integers(1, 4),
    before=st.integers(0, 6),
    behind=st.integers(0, 6),
    dilation=st.integers(1, 2),
    ceil_mode=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
TRANSPOSED = st.builds(
    TransposedWindow,
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 6),
    dilation=st.integers(1, 2),
    output_padding=st.integers(0, 3),
)


@given(st.integers(0, 200), st.integers(1, 70))
def test_parts_share_all_rows_evenly(size: int, parts: int) -> None:
    edges = bounds(size, parts)
    assert (edges[0], edges[-1], len(edges)) == (0, size, parts + 1)
    sizes = [part_of(size, parts, part).size for part in range(parts)]
    assert max(sizes) - min(sizes) <= 1
    assert [Interval(*edge) for edge in pairwise(edges)] == [
        part_of(size, parts, part) for part in range(parts)
    ]


@given(st.lists(st.integers(PADDING, 30)))
def test_intervals_are_the_rows_each_once(rows: list[int]) -> None:
    found = intervals(rows)
    assert [row for each in found for row in range(*each)] == sorted({*rows} - {PADDING})
    assert all(one.stop < other.start for one, other in pairwise(found))


def padded(window: Window, size: int) -> list[int]:
    """The rows that a window slides over, by lists that are turned and repeated."""
    rows = list(range(size))
    before, behind = {
        "zeros": ([PADDING] * 6, [PADDING] * 6),
        "replicate": ([0] * 6, [size - 1] * 6),
        "circular": (rows[-6:], rows[:6]),
        "reflect": (rows[1:7][::-1], rows[:-1][::-1][:6]),
    }[window.mode]
    return before[len(before) - window.before :] + rows + behind[: window.behind]


def fits(window: Window, size: int) -> bool:
    """Whether torch pads that far, and has an output; only poolings have windows that overhang."""
    most = {"reflect": size - 1, "circular": size}.get(window.mode, 6)
    if window.ceil_mode:
        most = window.kernel // 2 if window.mode == "zeros" else -1
    longest = max(window.before, window.behind)
    return longest <= most and window.reach <= size + window.before + window.behind


@given(WINDOWS, SIZES, PARTS)
def test_a_window_reads_what_it_slides_over(window: Window, size: int, parts: int) -> None:
    assume(fits(window, size))
    row_of = padded(window, size)
    starts = range(0, len(row_of), window.stride)
    inside = [start for start in starts if start + window.reach <= len(row_of)]
    if window.ceil_mode:
        if inside[-1] + window.reach < len(row_of):
            inside.append(inside[-1] + window.stride)  # the one that overhangs
        inside = [start for start in inside if start < window.before + size]
    assert window.num_outputs(size) == len(inside)

    found = exchange(window, size, parts)
    for rows, outputs in zip(found.rows, found.outputs, strict=True):
        for place, output in enumerate(range(*outputs)):
            at = place * window.stride
            read = rows[at : at + window.reach : window.dilation]
            seen = row_of[inside[output] : inside[output] + window.reach]
            seen += [PADDING] * (window.reach - len(seen)) if window.mode == "zeros" else []
            assert list(read)[: len(seen[:: window.dilation])] == seen[:: window.dilation]
            assert len(read) == window.kernel
        needed = (outputs.size - 1) * window.stride + window.reach if outputs.size else 0
        assert len(rows) == needed


@given(TRANSPOSED, SIZES, PARTS)
def test_a_transposed_window_reads_all_that_reach_it(
    window: TransposedWindow, size: int, parts: int
) -> None:
    count = window.num_outputs(size)
    assume(count > 0)
    found = exchange(window, size, parts)
    reached = [
        {row * window.stride - window.padding + window.dilation * k for k in range(window.kernel)}
        for row in range(size)
    ]
    for rows, outputs in zip(found.rows, found.outputs, strict=True):
        needed = [row for row in range(size) if reached[row] & set(range(*outputs))]
        assert set(needed) <= set(rows)
        if window.dilation == 1:
            assert rows == tuple(needed)
        assert not rows or rows == tuple(range(rows[0], rows[-1] + 1))


def resizes() -> st.SearchStrategy[tuple[Resize, int]]:
    def one(size: int, outputs: int, factor: float | None, mode: str, aligned: bool) -> Resize:
        if factor is not None:
            outputs = max(1, int(size * factor))
        scale = 1 / factor if factor is not None else size / outputs
        return Resize(outputs, scale, mode, aligned)  # type: ignore[arg-type]

    modes = st.sampled_from(["nearest", "nearest-exact", "linear"])
    factors = st.none() | st.floats(0.2, 4)
    rest = (st.integers(1, 130), factors, modes, st.booleans())
    return SIZES.flatmap(
        lambda size: st.tuples(st.builds(one, st.just(size), *rest), st.just(size))
    )


@given(resizes(), PARTS)
def test_a_resize_reads_near_its_place(drawn: tuple[Resize, int], parts: int) -> None:
    resize, size = drawn
    found = exchange(resize, size, parts)
    for rows, outputs in zip(found.rows, found.outputs, strict=True):
        taps = resize.taps(outputs, size)
        assert [*taps.low, *taps.high] == [
            row for row in (*taps.low, *taps.high) if rows[0] <= row <= rows[-1]
        ]
        assert all(0 <= share <= 1 for share in taps.share)
        assert all(high - low in (0, 1) for low, high in zip(taps.low, taps.high, strict=True))
        assert rows == tuple(range(rows[0], rows[-1] + 1)) if rows else not outputs.size


@pytest.mark.parametrize(
    ("resize", "low"),
    [
        (Resize(8, 1 / 2.05), (0, 0, 1, 1, 2, 2, 3, 3)),  # twice as many: each row twice
        (Resize(4, 1 / 1.05), (0, 1, 2, 3)),  # as many: a copy
        (Resize(4, 1 / 1.05, "linear"), (0, 1, 2, 3)),
        (Resize(3, 4 / 3, "linear", aligned=True), (0, 1, 3)),
        (Resize(3, 4 / 3), (0, 1, 2)),
        (Resize(3, 4 / 3, "nearest-exact"), (0, 2, 3)),
    ],
)
def test_rows_of_a_resize_from_four(resize: Resize, low: tuple[int, ...]) -> None:
    assert resize.taps(Interval(0, resize.outputs), 4).low == low


def test_nearest_rows_are_found_in_single_precision() -> None:
    """The first row of 2 stands in 41 of 82 places, and torch's rounding gives it one more."""
    assert Resize(82, 2 / 82).taps(Interval(0, 82), 2).low == (0,) * 42 + (1,) * 40


@given(st.one_of(WINDOWS, TRANSPOSED, resizes()), SIZES, PARTS)
def test_each_row_comes_from_its_owner_once(
    drawn: AxisWindow | tuple[Resize, int], size: int, parts: int
) -> None:
    window, size = drawn if isinstance(drawn, tuple) else (drawn, size)
    assume(not isinstance(window, Window) or fits(window, size))
    assume(window.num_outputs(size) > 0)
    found = exchange(window, size, parts)
    moved = 0
    for taker in range(parts):
        taken = [found.taken(giver, taker) for giver in range(parts)]
        for giver, pieces in enumerate(taken):
            own = found.own[giver]
            assert all(own.start <= each.start < each.stop <= own.stop for each in pieces)
            moved += sum(each.size for each in pieces) if giver != taker else 0
        rows = [row for pieces in taken for each in pieces for row in range(*each)]
        assert rows == sorted({*found.rows[taker]} - {PADDING})
        assert found.num_wanted(taker) == len(rows)
        placed = [PADDING if at == PADDING else rows[at] for at in found.positions(taker)]
        assert tuple(placed) == found.rows[taker]
    assert found.moves == (moved > 0)
    if found.is_local:
        assert not found.moves
        assert sum(map(found.num_wanted, range(parts))) == size


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_halos_have_a_closed_form(parts: int, kernel: int, stride: int, dilation: int) -> None:
    """Where strides divide the shares: rows below, and rows above, between any two neighbours."""
    reach = dilation * (kernel - 1) + 1
    padding = (reach - 1) // 2
    window = Window(kernel, stride, padding, padding, dilation)
    found = exchange(window, 16 * parts, parts)
    halo = {
        (giver, taker): sum(each.size for each in found.taken(giver, taker))
        for giver in range(parts)
        for taker in range(parts)
        if found.taken(giver, taker) and giver != taker
    }
    below, above = padding, max(0, reach - stride - padding)
    expected = {(part, part + 1): below for part in range(parts - 1) if below}
    expected |= {(part + 1, part): above for part in range(parts - 1) if above}
    assert halo == expected
    assert found.is_local == (reach == stride == 1)


def test_what_lies_on_a_ring_and_far_away() -> None:
    ring = exchange(Window(3, before=1, behind=1, mode="circular"), 8, 4)
    assert ring.taken(3, 0) == (Interval(7, 8),)
    assert ring.taken(0, 3) == (Interval(0, 1),)
    far = exchange(Window(11, before=5, behind=5), 4, 4)  # four rows, each of its own part
    assert all(far.wanted[part] == (Interval(0, 4),) for part in range(4))
    assert exchange(Window(2, 2), 8, 4).is_local
    assert exchange(Window(3, before=1, behind=1), 8, 1).is_local  # constants are not fetched
    assert exchange(Window(3, before=1, behind=1, mode="circular"), 8, 1).is_local
    assert not exchange(Window(2, 2), 8, 4).moves
    thinned = exchange(Window(1, 2), 8, 2)  # reads no row of another, and not all of its own
    assert (thinned.moves, thinned.is_local) == (False, False)
