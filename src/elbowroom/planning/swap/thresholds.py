"""TFLMS's rule: swap what sleeps longer than a threshold, bring it some levels ahead of its use.

Of IBM's TensorFlow Large Model Support, version 2 (arXiv 1811.12174 and its code). Its levels of a
graph are ticks here. Its autotune first finds a mode of waiting that fits, then the largest
threshold, then the longest lead; its grouping of copies back is moot, as all uses share one copy.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.room import StepRoom, SwappedArrays
from elbowroom.plans.swap import Swapped


class Rule(NamedTuple):
    """A setting of TFLMS.

    Args:
        threshold: storages whose first use is more ticks than this after their pack are swapped.
        ahead: ticks before its use at which a storage is brought.
        waits_out: whether a copy out is awaited at once (sync_mode 1 and 3), or a tick later.

    """

    threshold: int
    ahead: int
    waits_out: bool


def rule_choices(profile: StepProfile, rule: Rule) -> dict[int, Swapped]:
    """Choices of a rule, by storage; what somebody else holds anyway is kept.

    Copies out begin at the pack. No copy back is asked for before the backward begins.
    """
    choices = {}
    for storage in profile.storages:
        use = storage.use_tick
        if storage.is_held_elsewhere or use is None or use - storage.pack_tick <= rule.threshold:
            continue
        drop = storage.pack_tick + (not rule.waits_out)
        bring = max(use - rule.ahead, profile.num_forward_ticks, drop)
        choices[storage.number] = Swapped(storage.number, min(drop, use), min(bring, use))
    return choices


class Autotune:
    """TFLMS's autotune for one profile: it simulates a step's memory under one rule after another.

    The authors leave a tenth of the memory free, as their simulation of it is not exact; this one
    is, so all of the budget is used.
    """

    def __init__(self, room: StepRoom) -> None:
        self._room = room
        self._peaks: dict[Rule, int] = {}

    def rule(self, budget_bytes: int) -> Rule | None:
        """The setting for a budget, static bytes included; None if the tightest does not fit."""
        # sync_mode 0 to 3: wait for nothing at once, for copies out, for copies in, for both.
        for ahead, waits_out in ((1, False), (1, True), (0, False), (0, True)):
            tightest = Rule(0, ahead, waits_out)
            if self._peak(tightest) <= budget_bytes:
                break
        else:
            return None
        rule = self._largest("threshold", tightest, budget_bytes)
        return self._largest("ahead", rule, budget_bytes) if ahead else rule

    def _largest(self, key: Literal["threshold", "ahead"], rule: Rule, budget_bytes: int) -> Rule:
        """The rule, which fits, with the largest number in ``key`` that does: by bisection."""
        low, high = getattr(rule, key), self._room.profile.num_ticks
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._peak(rule._replace(**{key: middle})) <= budget_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return rule._replace(**{key: low})

    def _peak(self, rule: Rule) -> int:
        """Peak of a rule's step, static bytes included: that of ``rule_choices``, faster."""
        if rule not in self._peaks:
            lots, profile = self._room.lots, self._room.profile
            drops = np.minimum(lots.packs + (not rule.waits_out), lots.uses)
            brings = np.maximum(lots.uses - rule.ahead, profile.num_forward_ticks)
            brings = np.minimum(np.maximum(brings, drops), lots.uses)
            is_swapped = lots.is_used & (lots.uses - lots.packs > rule.threshold)
            peak = self._room.peak_bytes(SwappedArrays(is_swapped, drops, brings))
            self._peaks[rule] = profile.static_bytes + peak
        return self._peaks[rule]
