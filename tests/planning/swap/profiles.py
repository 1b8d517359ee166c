"""Step profiles made by hand."""

from __future__ import annotations

from elbowroom.core.step_profile import SavedStorage, StepProfile


def two_storages() -> StepProfile:
    """Two storages of 100 and 60 bytes: saved at ticks 0 and 1, used at 3 and 2 of 4.

    All swapped, the log holds 100, 60, 60, 100 one after the other, and a gradient of 10 from the
    first use on.
    """
    log = [
        (100, "make the first"),
        (0, "tick 0 saves it"),
        (60, "make the second from it"),
        (-100, "the first goes"),
        (0, "tick 1 saves the second"),
        (-60, "the second goes"),
        (0, "tick 2 asks for the second"),
        (60, "it comes back"),
        (10, "a gradient"),
        (-60, "the second goes"),
        (0, "tick 3 asks for the first"),
        (100, "it comes back"),
        (-100, "the first goes"),
    ]
    return StepProfile(
        seconds_before=0.1,
        seconds=(0.1, 0.2, 0.3, 0.4),
        num_forward_ticks=2,
        tick_positions=(1, 4, 6, 10),
        deltas=tuple(delta for delta, _ in log),
        static_bytes=1000,
        smallest_bytes=1,
        storages=(
            SavedStorage(0, 100, "first", (0,), (3,), free=3, bring=11, release=12),
            SavedStorage(1, 60, "second", (1,), (2,), free=5, bring=7, release=9),
        ),
    )
