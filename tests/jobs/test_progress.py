"""The live view: what it says, and how often."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from elbowroom.jobs.progress import JobSnapshot, ProgressView, ReplicaStats

RUNNING = ReplicaStats(0, "running", num_running=5, num_waiting=2, kv_usage=0.42)


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Screen:
    """A view on a stream that is no terminal, and a clock that is moved by hand."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self._clock = Clock()
        self.view = ProgressView(Console(file=self._stream, width=40), self._clock)

    def update(self, snapshot: JobSnapshot, after_seconds: float = 0.0) -> None:
        self._clock.seconds += after_seconds
        self.view.update(snapshot)

    @property
    def lines(self) -> list[str]:
        return self._stream.getvalue().splitlines()


@pytest.fixture
def screen() -> Screen:
    return Screen()


def snapshot(seconds: float, prompt_tokens: int = 0, output_tokens: int = 0) -> JobSnapshot:
    """Half of 100 rows done, by two replicas, 20 s after the start began."""
    replica = replace(RUNNING, prompt_tokens=prompt_tokens, generation_tokens=output_tokens)
    return JobSnapshot(100, 50, 0, seconds + 20, seconds, (replica, ReplicaStats(1, "starting")))


def test_a_line_says_where_the_job_is(screen: Screen) -> None:
    screen.update(JobSnapshot(100, 25, 3, 3725.0, 60.0, (RUNNING, ReplicaStats(1, "starting"))))
    assert screen.lines == [
        "25/100 rows (3 failed), tokens/s: 0 prompt (0 overall), 0 output (0 overall), "
        "1:02:05 elapsed, ETA 3:00 [0: 5 running, 2 waiting, KV 42%] [1 starting]"
    ]


def test_failed_rows_are_named_only_if_there_are_some(screen: Screen) -> None:
    screen.update(snapshot(10))
    assert "failed" not in screen.lines[0]


@pytest.mark.parametrize(
    ("rows_done", "run_seconds", "eta"),
    [(0, 30.0, "-"), (5, 0.0, "-"), (50, 30.0, "0:30"), (100, 30.0, "0:00"), (1, 100.0, "2:45:00")],
)
def test_the_time_left_follows_from_the_rows(
    screen: Screen, rows_done: int, run_seconds: float, eta: str
) -> None:
    screen.update(JobSnapshot(100, rows_done, 0, 40.0, run_seconds, ()))
    assert screen.lines[0].rstrip().endswith(f"ETA {eta}")


def test_lines_come_every_five_seconds_and_once_at_the_end(screen: Screen) -> None:
    with screen.view:
        for tick in range(26):  # 6.25 s
            screen.update(replace(snapshot(10), rows_done=tick), after_seconds=0.25)
        assert [line.split()[0] for line in screen.lines] == ["0/100", "20/100"]
    assert [line.split()[0] for line in screen.lines] == ["0/100", "20/100", "25/100"]


def test_what_was_shown_is_not_repeated_at_the_end(screen: Screen) -> None:
    with screen.view:
        screen.update(snapshot(10))
    assert len(screen.lines) == 1


def test_a_failed_job_ends_without_a_last_line(screen: Screen) -> None:
    with pytest.raises(KeyboardInterrupt), screen.view:
        screen.update(snapshot(10))
        screen.update(snapshot(11), after_seconds=1)
        raise KeyboardInterrupt
    assert len(screen.lines) == 1


def test_rates_are_of_the_last_ten_seconds_and_of_the_run(screen: Screen) -> None:
    for second in range(31):  # 10 output tokens/s, then 40; twice as many prompt tokens
        num_tokens = 10 * second if second <= 20 else 200 + 40 * (second - 20)
        screen.update(snapshot(second, 2 * num_tokens, num_tokens), after_seconds=1.0)
    rates = "tokens/s: 80 prompt (40 overall), 40 output (20 overall)"
    assert rates in screen.lines[-1]


def test_rates_survive_updates_that_are_rare(screen: Screen) -> None:
    screen.update(snapshot(30, output_tokens=1000))
    screen.update(snapshot(60, output_tokens=1600), after_seconds=30)
    assert "20 output" in screen.lines[-1]


def test_rates_survive_updates_for_every_message(screen: Screen) -> None:
    screen.update(snapshot(1))
    for message in range(1, 6001):
        tick_seconds = 0.001
        screen.update(snapshot(1, output_tokens=message), after_seconds=tick_seconds)
    assert len(screen.lines) == 2
    assert "1000 output" in screen.lines[-1]


def test_a_terminal_shows_a_table_at_most_four_times_a_second() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with ProgressView(console, clock) as view:
        view.update(replace(snapshot(10), rows_done=7))
        drawn = stream.getvalue()
        for part in ("7/100 rows", "KV use", "running", "42%", "starting"):
            assert part in drawn
        clock.seconds += 0.1
        view.update(replace(snapshot(10), rows_done=8))
        assert "8/100 rows" not in stream.getvalue()
        clock.seconds += 0.15
        view.update(replace(snapshot(10), rows_done=9))
        assert "9/100 rows" in stream.getvalue()


def test_a_view_without_updates_is_silent(screen: Screen) -> None:
    with screen.view:
        pass
    assert screen.lines == []


def test_rows_of_earlier_runs_do_not_count_as_pace(screen: Screen) -> None:
    screen.update(JobSnapshot(100, 50, 0, 40.0, 30.0, (), rows_resumed=40))
    assert screen.lines[0].rstrip().endswith("ETA 2:30")
