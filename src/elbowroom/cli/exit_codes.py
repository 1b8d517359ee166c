"""Exit codes of every command: one meaning each."""

from __future__ import annotations

from elbowroom.core.errors import (
    ElbowroomError,
    InputError,
    JobStoppedError,
    MemoryPlanError,
    OutputError,
    UnsupportedModelError,
)

EXIT_CODES = """\
exit codes:
  0   every row was answered (check, verify: nothing is wrong)
  3   finished, but some rows failed (check: some would; verify: results are not complete)
  75  stopped before the end: finished rows are kept, the same command resumes
  2   bad usage or bad input: nothing was done
  1   a failure inside
"""

EXIT_GOOD = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_FAILED_ROWS = 3
EXIT_RESUMABLE = 75

RUN_CODES = {
    EXIT_GOOD: "every row was answered",
    EXIT_FAILED_ROWS: "finished, but some rows failed",
    EXIT_RESUMABLE: "stopped before the end: finished rows are kept, the same command resumes",
    EXIT_BAD_INPUT: "bad usage or bad input: nothing was done",
    EXIT_FAILURE: "a replica failed at its first start, or a failure inside",
}
CHECK_CODES = {
    EXIT_GOOD: "nothing is wrong",
    EXIT_FAILED_ROWS: "some rows would fail",
    EXIT_BAD_INPUT: "the files or the model cannot be read",
}
VERIFY_CODES = {
    EXIT_GOOD: "each row has exactly one result",
    EXIT_FAILED_ROWS: "results are not complete",
    EXIT_BAD_INPUT: "the files cannot be read",
}


def exit_code(error: ElbowroomError) -> int:
    if isinstance(error, JobStoppedError):
        return EXIT_RESUMABLE
    if isinstance(error, InputError | OutputError | MemoryPlanError | UnsupportedModelError):
        return EXIT_BAD_INPUT
    return EXIT_FAILURE
