"""Weight versions that a schedule's minibatches are trained with, and how many are kept.

Version v of a stage is its weights after v updates. Everything is read off the action lists;
nothing is assumed about how they were made.

- ``stash`` (weight stashing): the forward takes the newest version of its stage, and the backward
  takes the same one again. In a straight 1F1B pipeline of n stages that is max(0, i - d (n-1-k))
  for minibatch i at stage k, which keeps d (n-1-k) + 1 versions (arXiv 1806.03377, where the depth
  d is 1). In a flushed schedule there is one.
- ``vertical-sync``: all stages take the version that the input stage has at the forward, which each
  counts by itself: in a straight pipeline max(0, i - d (n-1)), and d (n-1) + 1 versions at each
  stage. Where stages update after rounds of different lengths, a stage takes its newest version
  that counts no minibatch which the input stage's version does not count.
- ``naive``: the newest version, also in the backward: one version, wrong gradients.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from elbowroom.core.errors import ScheduleError
from elbowroom.plans.pipeline_actions import Backward, Forward, Schedule, Update

VersionRule = Literal["stash", "vertical-sync", "naive"]
VERSION_RULES: tuple[VersionRule, ...] = get_args(VersionRule)

Versions = Mapping[Forward, int]
"""Weight version that each forward uses: the number of updates before it."""


class Held(NamedTuple):
    """Contents of a worker at one time: minibatches between forward and backward, and versions."""

    in_flight: int
    versions: int


def forward_versions(schedule: Schedule, rule: VersionRule = "stash") -> dict[Forward, int]:
    """Weight version of each forward of a checked schedule.

    ``naive`` differs from ``stash`` in backwards alone. Raises ScheduleError if vertical sync asks
    for a version that does not exist yet.
    """
    newest: dict[Forward, int] = {}
    for actions in schedule.actions:
        num_updates = 0
        for action in actions:
            num_updates += isinstance(action, Update)
            if isinstance(action, Forward):
                newest[action] = num_updates
    return _synced(schedule, newest) if rule == "vertical-sync" else newest


def held_over_time(
    schedule: Schedule, worker: int, rule: VersionRule = "stash", used: Versions | None = None
) -> list[Held]:
    """Contents of a worker after each of its actions; ``used`` are the ``forward_versions``.

    A version is dropped when it is neither the newest nor will be used again, a minibatch after its
    backward. Buffers of transfers and gradients are not counted.
    """
    actions = schedule.actions[worker]
    used = forward_versions(schedule, rule) if used is None else used
    started: dict[int, int] = {}
    in_flight, updates, last_uses = [0] * len(actions), [0], [0]
    for index, action in enumerate(actions):
        if isinstance(action, Forward):
            started[action.minibatch] = index
        elif isinstance(action, Backward):
            version = used[Forward(action.stage, action.minibatch)]
            last_uses += [0] * (version + 1 - len(last_uses))
            last_uses[version] = index
            in_flight[started[action.minibatch]] += 1
            in_flight[index] -= 1
        elif isinstance(action, Update):
            updates.append(index)
    changes = [0] * (len(actions) + 1)
    for version, created in enumerate(updates):
        is_newest = version + 1 == len(updates)
        replaced = len(actions) if is_newest else updates[version + 1]
        last_use = last_uses[version] if version < len(last_uses) else 0
        changes[created] += 1
        changes[max(replaced, last_use)] -= 1
    versions = accumulate(changes[:-1])
    return [
        Held(count, 1 if rule == "naive" else kept)
        for count, kept in zip(accumulate(in_flight), versions, strict=True)
    ]


def _synced(schedule: Schedule, newest: Versions) -> dict[Forward, int]:
    """Version of every stage for each minibatch, derived from the input stage's."""
    counted = [_counted(schedule, stage) for stage in range(schedule.num_stages)]
    synced: dict[Forward, int] = {}
    for forward, version in newest.items():
        at_input = newest[Forward(0, forward.minibatch)]
        num_counted = counted[0][at_input - 1] if at_input else 0
        synced[forward] = bisect_right(counted[forward.stage], num_counted)
        if synced[forward] > version:
            raise ScheduleError(
                f"vertical sync needs version {synced[forward]}, the stage has {version}: "
                "update each stage before its next pass",
                action=str(forward),
            )
    return synced


def _counted(schedule: Schedule, stage: int) -> list[int]:
    """Number of minibatches that a stage's weights count after each of its updates."""
    actions = schedule.actions[schedule.workers(stage)[0]]
    return [action.minibatch + 1 for action in actions if isinstance(action, Update)]
