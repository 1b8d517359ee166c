"""Restarts: pauses that grow, a budget per ten minutes, and rows that are to blame."""

from __future__ import annotations

from elbowroom.jobs.restarts import WINDOW_SECONDS, RestartPolicy


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_until_a_row_finishes() -> None:
    policy = RestartPolicy(10, Clock())
    assert [policy.died(False) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    policy.finished_row()
    assert policy.died(False) == 1


def test_a_replica_that_dies_too_often_is_given_up() -> None:
    policy = RestartPolicy(2, Clock())
    for _ in range(2):
        assert policy.died(False) is not None
        policy.finished_row()
    assert policy.died(False) is None


def test_no_restarts_at_all() -> None:
    assert RestartPolicy(0, Clock()).died(False) is None


def test_old_deaths_are_forgotten() -> None:
    clock = Clock()
    policy = RestartPolicy(1, clock)
    assert policy.died(False) is not None
    policy.finished_row()
    clock.now = WINDOW_SECONDS
    assert policy.died(False) is not None
    policy.finished_row()
    clock.now += 1
    assert policy.died(False) is None


def test_a_row_that_kills_is_not_held_against_the_replica() -> None:
    policy = RestartPolicy(1, Clock())
    assert policy.died(False) is not None
    for _ in range(5):
        policy.finished_row()
        assert policy.died(True) is not None


def test_a_replica_that_does_nothing_but_die_is_given_up() -> None:
    policy = RestartPolicy(2, Clock())
    assert policy.died(False) is not None
    assert policy.died(True) is not None
    assert policy.died(True) is None


def test_a_death_that_a_row_was_found_to_cause_is_excused() -> None:
    policy = RestartPolicy(1, Clock())
    for _ in range(5):
        assert policy.died(False) is not None
        policy.finished_row()
        policy.excuse()
        assert policy.died(True) is not None
        policy.finished_row()
