"""Report of a run: ``report.json``, and a short table on the screen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elbowroom.core.files import write_json
from elbowroom.core.units import format_bytes
from elbowroom.plans.pool import Prediction, RunPlan, TokenKind
from elbowroom.pool.stats import PoolStats

_KINDS: tuple[TokenKind, ...] = ("prompt", "output")


@dataclass(frozen=True)
class ReplicaReport:
    """One replica's part of a run. Resident bytes are weights and slots, measured after loading."""

    replica: int
    num_kv_tokens: int
    resident_bytes: int
    start_seconds: float
    num_restarts: int
    num_preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    pool: PoolStats


@dataclass(frozen=True)
class JobReport:
    """A finished job: its plan, its rows by outcome, tokens, seconds and replicas.

    Rows and tokens are those of the whole job, of which ``num_resumed`` rows were finished by
    earlier runs; seconds, replicas and tokens of the ``run`` are of this run.
    ``prediction_for_actual`` is predicted again, with the output lengths that occurred.
    """

    plan: RunPlan
    num_rows: int
    num_succeeded: int
    num_resumed: int
    failures: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    run_prompt_tokens: int
    run_output_tokens: int
    start_seconds: float
    run_seconds: float
    replicas: tuple[ReplicaReport, ...]
    prediction_for_actual: Prediction | None = None

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    @property
    def rated_by(self) -> TokenKind:
        return "prompt" if self.prompt_tokens and not self.output_tokens else "output"

    def tokens_per_second(self, kind: TokenKind) -> float:
        """Tokens per second while rows were answered, start-up left out."""
        tokens = self.run_output_tokens if kind == "output" else self.run_prompt_tokens
        return tokens / self.run_seconds if self.run_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "plan": self.plan.to_json(),
            "num_failed": self.num_failed,
            **{f"{kind}_tokens_per_second": self.tokens_per_second(kind) for kind in _KINDS},
        }

    def write(self, path: Path) -> None:
        """Write ``report.json`` in one step. Raises OutputError."""
        write_json(path, self.to_json(), ascii_only=False)


def print_summary(console: Console, report: JobReport) -> None:
    table = Table(title="Report", title_justify="left", show_header=False, box=None)
    for name, value in _summary(report):
        table.add_row(name, value)
    console.print(table)


def _summary(report: JobReport) -> list[tuple[str, str]]:
    rows = f"{report.num_succeeded} of {report.num_rows} answered"
    if report.num_resumed:
        rows += f" ({report.num_resumed} finished before this run)"
    failures = ", ".join(f"{count} {code}" for code, count in sorted(report.failures.items()))
    kv_tokens = ", ".join(str(replica.num_kv_tokens) for replica in report.replicas)
    budget = report.plan.budget
    planned = budget.kv_tokens_text(report.plan.engine.max_model_len)
    held = ", ".join(format_bytes(replica.resident_bytes) for replica in report.replicas)
    hits = sum(replica.prefix_hit_tokens for replica in report.replicas)
    pools = [replica.pool for replica in report.replicas]
    mapped = sum(pool.mapped_bytes for pool in pools)
    streamed = sum(pool.streamed_bytes for pool in pools)
    num_streamed = sum(pool.streamed_iterations for pool in pools)
    num_shipped = sum(pool.shipped_iterations for pool in pools)
    rows_shipped = sum(pool.shipped_rows for pool in pools)
    queries = sum(replica.prefix_query_tokens for replica in report.replicas)
    return [
        ("rows", rows + (f"; failed: {failures}" if failures else "")),
        ("tokens", f"{report.prompt_tokens} prompt, {report.output_tokens} output"),
        ("seconds", f"{report.start_seconds:.1f} start-up, {report.run_seconds:.1f} run"),
        (f"{report.rated_by} tokens/s", f"{report.tokens_per_second(report.rated_by):.1f}"),
        ("predicted", _predicted(report)),
        ("predicted for actual tokens", _for_actual(report)),
        ("KV tokens per replica", f"{kv_tokens} (planned: {planned})"),
        (
            "weights and slots held",
            f"{held} (planned: {format_bytes(budget.weight_bytes + budget.slot_bytes)})",
        ),
        ("preemptions", str(sum(replica.num_preemptions for replica in report.replicas))),
        ("restarts", str(sum(replica.num_restarts for replica in report.replicas))),
        ("prompt tokens in the prefix cache", _share(hits, queries)),
        ("weights mapped, streamed", f"{format_bytes(mapped)}, {format_bytes(streamed)}"),
        ("iterations streamed, shipped", f"{num_streamed}, {num_shipped} with {rows_shipped} rows"),
        ("seconds compute waited", f"{sum(pool.wait_seconds for pool in pools):.1f}"),
    ]


def _predicted(report: JobReport) -> str:
    prediction = report.plan.prediction
    if prediction is None:
        return "nothing"
    return f"{prediction} for {prediction.rated_tokens} {prediction.rated_by} tokens"


def _for_actual(report: JobReport) -> str:
    """Text with the prediction for actual lengths, and measured over predicted tokens/s.

    It is shown as well because rows may have ended before their limit.
    """
    prediction = report.prediction_for_actual
    if prediction is None:
        return "nothing"
    ratio = report.tokens_per_second(prediction.rated_by) / prediction.tokens_per_second
    return f"{prediction} (outcome {ratio:.2f}x)"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.0%})" if whole else "")
