"""What a run decides when nobody says: layout, memory, dtype, rows at once, tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.app.machine import ENGINE_BYTES
from elbowroom.app.plan import model_facts, plan_job, run_plan
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.cli.main import main
from elbowroom.core import host
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.model import read_model
from elbowroom.core.workload import parse_lengths
from elbowroom.jobs.job import Job
from elbowroom.planning.pool.layouts import EngineLimits, layout_budget, replica_limits
from elbowroom.planning.pool.search import LEAST_TOKENS, MOST_ROWS, evaluate, fill_in
from elbowroom.plans.pool import Layout, RunPlan, read_any_plan
from tests.jobs.plans import write_batch
from tests.planning.facts import CPU, H200, MODELS
from tests.tiny_model import CONFIG, llama_shapes, write_model

MIB, GIB = 2**20, 2**30


class Report:
    num_failed = 0


class Runs:
    """``elbowroom run`` up to its job: flags in, plans out."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.plans: list[RunPlan] = []
        self.inputs: list[str] = []

        async def run_job(job: Job) -> Report:
            self.plans.append(job.plan)
            self.inputs.append(job.input.batch.name)
            return Report()

        monkeypatch.setattr("elbowroom.app.batch.run_job", run_job)
        monkeypatch.setattr("elbowroom.cli.run.print_summary", lambda *_: None)
        monkeypatch.setattr(host, "free_memory_bytes", lambda: 4 * GIB)
        write_model(folder / "model", max_position_embeddings=4096)
        write_batch(folder / "in.jsonl", 50)

    def __call__(self, *flags: str) -> RunPlan:
        files = ("--input", str(self.folder / "in.jsonl"), "--output", str(self.folder / "out"))
        model = () if "--plan" in flags else ("--model", str(self.folder / "model"))
        assert main(["run", *model, *files, *flags]) == 0
        return self.plans[-1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_nothing_but_files(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    plan = run()
    assert plan.layout == Layout(1, 1, 1, "none")
    assert plan.cores == (host.cores(),), "one engine on all cores"
    assert plan.engine.dtype == host.fastest_dtype(CONFIG["dtype"])
    assert plan.engine.max_num_seqs == 50, "no more rows at once than there are"
    assert plan.engine.max_model_len == 4096, "what the model takes"
    assert plan.budget.num_kv_tokens < 10_000, "no more cache than the job or a row can fill"
    said = capsys.readouterr().err
    assert said.count("taken: 1 replica on ") == 1
    if len(host.cores()) > 1:
        assert said.count("next best: 2 replicas, each on ") == 1
        assert "x as long" in said


def test_what_is_said_is_taken(run: Runs) -> None:
    plan = run("--replicas", "2", "--memory", "64MiB", "--max-num-seqs", "3", "--pool", "none")
    assert (plan.num_replicas, plan.budget.memory_bytes) == (2, 64 * MIB)
    assert (plan.engine.max_num_seqs, plan.shares[0].mode) == (3, "none")
    auto = ("--replicas", "auto", "--memory", "auto", "--max-num-seqs", "auto", "--pool", "auto")
    assert run(*auto, "--max-model-len", "auto", "--max-num-batched-tokens", "auto") == run()


def test_a_pool_means_replicas_and_replicas_mean_a_pool(run: Runs) -> None:
    assert run("--pool", "streamed").num_replicas == max(2, len(host.cores()))
    plan = run("--replicas", "2", "--dtype", "bfloat16")
    assert plan.layout is not None
    assert plan.layout.pool != "none", "what replicas share is cache"


SCARCE = ("--replicas", "2", "--max-num-batched-tokens", "64", "--max-num-seqs", "2")
SCARCE += ("--max-model-len", "64", "--dtype", "bfloat16")


def test_the_pool_is_told_with_what_it_gains(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    memory = ("--memory", "40KiB")
    copies = run(*SCARCE, *memory, "--pool", "none").budget.num_kv_tokens
    assert "pool none: as asked for" in capsys.readouterr().err
    for pool in ("auto", "mapped", "streamed"):
        plan = run(*SCARCE, *memory, "--pool", pool)
        gain = plan.budget.num_kv_tokens / copies
        assert gain > 1.01 or pool == "streamed", "its slots are as large as a third of the layers"
        line = f"pool {plan.shares[0].mode}: {gain:.2f}x the KV cache of full copies"
        assert capsys.readouterr().err.count(line) == 1, (pool, line)
    pooled = run(*SCARCE, "--memory", "22300B").budget
    lacking = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("pool "))
    assert lacking.startswith("pool mapped: full copies lack ")
    assert pooled.kv_bytes > 0


def test_no_pool_is_told_with_the_reason(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*flags: str) -> str:
        run(*flags, "--memory", "64MiB")
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("pool ")]
        assert len(lines) == 1, "one line"
        return lines[0]

    assert said() == "pool none: one replica shares with nobody: --replicas 2 or more might pool"
    two = ("--replicas", "2")
    assert said(*two, "--", "--quantization", "fp8").startswith("pool none: --quantization fp8")
    shapes = {name: s for name, s in llama_shapes().items() if ".mlp." not in name}
    write_model(run.folder / "model", shapes)
    assert said(*two).startswith("pool none: none of its 3 layers has feed-forward matrices")
    assert said(*two, "--pool", "none") == "pool none: as asked for"


def test_memory_is_divided_among_replicas_and_what_engines_hold(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_batch(run.folder / "in.jsonl", 3000, max_tokens=4000)
    one, two = run(), run("--replicas", "2")
    assert one.budget.memory_bytes <= 0.9 * 4 * GIB - ENGINE_BYTES
    assert two.budget.memory_bytes <= 0.9 * 4 * GIB / 2 - ENGINE_BYTES
    monkeypatch.setattr(host, "free_memory_bytes", lambda: None)
    assert run().budget.memory_bytes <= CPU.device.usable_bytes


@pytest.mark.parametrize(("dtype", "shown"), [("float32", True), ("bfloat16", False)])
def test_the_fastest_dtype_is_taken_and_told(
    run: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    shown: bool,
) -> None:
    monkeypatch.setattr(host, "fastest_dtype", lambda *_: dtype)
    plan = run()
    assert plan.engine.dtype == dtype
    assert ("computed in float32" in capsys.readouterr().err) == shown
    assert (
        plan.budget.replicated_bytes == read_model(run.folder / "model", dtype).replicated_bytes()
    )
    assert run("--dtype", "bfloat16").engine.dtype == "bfloat16"


def test_several_inputs_are_one_job(run: Runs) -> None:
    other = write_batch(run.folder / "b.jsonl", 2)
    files = ["--input", str(run.folder / "in.jsonl"), str(other), "--output", str(run.folder / "o")]
    flags = ["--model", str(run.folder / "model"), "--input", str(run.folder / "in.jsonl")]
    assert main(["run", *files, *flags[:2]]) == 0
    assert run.inputs[-1] == f"{run.folder / 'in.jsonl'} and 1 more"
    assert main(["run", *files, *flags]) == 2, "no file twice"


def test_nothing_stands_between_options(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that belongs to no option is no option for vLLM: nothing is lost without a word."""
    flags = ["--model", "m", "--input", "i", "--output", "o", "--seed", "1"]
    with pytest.raises(SystemExit):
        main(["run", *flags, "stray"])
    assert "unrecognized arguments: stray" in capsys.readouterr().err
    assert main(["status", str(run.folder / "out"), "--", "x"]) == 2


def test_rows_that_cannot_fit_fail_alone(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """One row that asks for a billion tokens, and one longer than this little memory."""
    text = (run.folder / "in.jsonl").read_text()
    long = text.splitlines()[0].replace("id-0", "long").replace(": 8", f": {10**9}")
    longer = text.splitlines()[0].replace("id-0", "longer").replace(": 8", ": 3000")
    (run.folder / "in.jsonl").write_text(f"{text}{long}\n{longer}\n")
    small = ("--memory", "100KiB", "--max-num-batched-tokens", "256", "--max-num-seqs", "2")
    plan = run(*small, "--dtype", "bfloat16")  # float32 would need twice as much
    said = capsys.readouterr().err
    assert "1 rows of more than" in said
    assert plan.prediction is not None
    assert plan.prediction.num_rows == 50


def test_outputs_end_where_the_row_is_full(run: Runs) -> None:
    """A limit as long as the model's context is no row too long: vLLM shortens it."""
    write_batch(run.folder / "in.jsonl", 50, max_tokens=4096)
    plan = run()
    assert plan.prediction is not None
    assert plan.prediction.num_rows == 50
    assert plan.prediction.output_tokens < 50 * 4096


def test_more_memory_than_there_is(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--input", str(run.folder / "in.jsonl"), "--output", str(run.folder / "out"))
    flags = ("--model", str(run.folder / "model"), "--memory", "5000TiB")
    assert main(["run", *files, *flags]) == 2
    assert "that this machine has: lower --memory" in capsys.readouterr().err


QWEN = read_model(MODELS / "Qwen3-32B")
ROWS = parse_lengths("1024:512x10000")


def test_as_many_rows_at_once_as_fit() -> None:
    """A fixed 256 hides what the pool is for: the memory that it frees becomes rows."""
    layout, memory = Layout(2, 4, 1, "shipped", 3), H200.device.usable_bytes
    chosen = fill_in(QWEN, layout, memory, EngineLimits(), ROWS)
    assert chosen.max_num_seqs is not None
    limits = replica_limits(layout_budget(QWEN, layout, memory, chosen), chosen)
    assert limits.rows_at_once(ROWS) == chosen.max_num_seqs
    more = replace(chosen, max_num_seqs=chosen.max_num_seqs + 1)
    limits = replica_limits(layout_budget(QWEN, layout, memory, more), more)
    assert limits.num_kv_tokens < more.num_rows * limits.row_tokens(ROWS.mean_row), "not one more"
    fixed = evaluate(QWEN, H200, ROWS, EngineLimits(256, 2048), layout)
    free = evaluate(QWEN, H200, ROWS, EngineLimits(), layout)
    assert free.tokens_per_second > 1.2 * fixed.tokens_per_second


@pytest.mark.parametrize(
    ("lengths", "most"), [("8:8x100000", MOST_ROWS), ("1024:512x20", 3), ("1024:512x1", 1)]
)
def test_bounds_of_rows_at_once(lengths: str, most: int) -> None:
    layout = Layout(1, 1, 8, "none")
    memory = H200.device.usable_bytes
    chosen = fill_in(QWEN, layout, memory, EngineLimits(), parse_lengths(lengths))
    assert chosen.max_num_seqs == most


def test_fewer_tokens_of_an_iteration_where_memory_is_short() -> None:
    layout, rows = Layout(1, 1, 1, "none"), parse_lengths("64:64x10")
    needed = layout_budget(QWEN, layout, 0, EngineLimits(1, LEAST_TOKENS))
    memory = -needed.kv_bytes + 8 * 32 * needed.kv_bytes_per_token
    chosen = fill_in(QWEN, layout, memory, EngineLimits(), rows)
    assert chosen.max_num_batched_tokens == LEAST_TOKENS
    plenty = fill_in(QWEN, layout, memory + 4 * GIB, EngineLimits(), rows)
    assert plenty.max_num_batched_tokens == 2048
    given = fill_in(QWEN, layout, memory, EngineLimits(None, 1024), rows)
    assert given.max_num_batched_tokens == 1024, "what is said is taken"


@pytest.mark.parametrize("max_model_len", [None, 40_960])
def test_fewer_rows_where_a_long_one_needs_room(max_model_len: int | None) -> None:
    """Many short rows would fill a small cache; one of 30,000 tokens is to be answered, too."""
    layout = Layout(1, 1, 1, "none")
    rows = parse_lengths("20:4x100000,29000:1000x1")
    engine = EngineLimits(max_model_len=max_model_len)
    longest = max_model_len or 30_000
    fixed = layout_budget(QWEN, layout, 0, EngineLimits(1, LEAST_TOKENS))
    memory = -fixed.kv_bytes + (longest + 200) * fixed.kv_bytes_per_token
    chosen = fill_in(QWEN, layout, memory, engine, rows)
    assert chosen.num_rows <= chosen.num_tokens
    limits = replica_limits(layout_budget(QWEN, layout, memory, chosen), chosen)
    assert limits.num_kv_tokens >= longest
    hopeless = fill_in(QWEN, layout, memory // 2, engine, rows)
    assert (hopeless.max_num_seqs, hopeless.max_num_batched_tokens) == (1, LEAST_TOKENS)


def test_never_more_rows_than_tokens(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """VLLM would refuse it, after minutes."""
    layout, rows = Layout(1, 1, 8, "none"), parse_lengths("8:8x100000")
    chosen = fill_in(QWEN, layout, H200.device.usable_bytes, EngineLimits(None, 256), rows)
    assert chosen.max_num_seqs == 256
    files = ("--input", str(run.folder / "in.jsonl"), "--output", str(run.folder / "out"))
    flags = ("--model", str(run.folder / "model"), "--max-num-seqs", "9")
    assert main(["run", *files, *flags, "--max-num-batched-tokens", "8"]) == 2
    assert "has no token for each of" in capsys.readouterr().err


def test_a_job_of_which_nothing_is_known_has_all_room(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no job of one row; and rows without a limit may be longer than was assumed."""

    def fail(*_: object) -> None:
        raise RuntimeError("no lengths")

    body = {"messages": [{"role": "user", "content": "on and on"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (run.folder / "in.jsonl").write_text(json.dumps(line))
    assert run().budget.memory_bytes > 2 * GIB
    monkeypatch.setattr("elbowroom.app.prepare.read_lengths", fail)
    plan = run()
    assert plan.engine.max_num_seqs == MOST_ROWS
    assert plan.budget.memory_bytes > 2 * GIB
    assert plan.prediction is None


def test_a_plan_of_a_preset_takes_the_fastest() -> None:
    settings = PlanSettings(MODELS / "Qwen3-32B", "h200-8")
    planned = plan_job(settings, model_facts(settings), ROWS, "")
    best = planned.choice.best
    assert best is not None
    fitting = [candidate for candidate in planned.candidates if candidate.fits]
    assert best.seconds <= 1.01 * min(candidate.seconds for candidate in fitting)
    other = planned.choice.next_best
    assert other is not None
    assert other.layout != best.layout
    with_weights = replace(planned, model=replace(planned.model, has_weights=True))
    plan = run_plan(with_weights, best, settings, "a job")
    assert plan.engine.max_num_seqs == best.engine.max_num_seqs
    assert RunPlan.from_json(plan.to_json()) == plan


def test_every_option_of_a_plan_reaches_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    flags = ("--seed", "7", "--served-model-name", "x", "--max-model-len", "777")
    flags += ("--fetch-order", "sliced", "--no-prefix-caching", "--pool", "streamed")
    job = ("--model", str(MODELS / "Llama-3.1-8B"), "--cluster", "h200-8", "--lengths", "64:64x50")
    assert main(["plan", *job, *flags, "--json", str(path), "--", "--more", "1"]) == 0
    plan = read_any_plan(path)
    engine = plan.engine
    assert (engine.seed, engine.max_model_len, engine.prefix_caching) == (7, 777, False)
    assert engine.served_model_names[0] == "x"
    assert engine.extra == ("--more", "1")
    assert plan.made_for == "64:64x50"
    assert read_cluster("h200-8").num_devices == plan.num_replicas * (
        plan.layout.tensor_parallel if plan.layout else 1
    )


def test_state_of_layers_is_not_shared_by_prefixes(run: Runs) -> None:
    """Of layers that keep a state: vLLM's engine on CPUs fails if it is asked to."""
    flags = ("--memory", "64MiB", "--replicas", "2")
    assert run(*flags).engine.prefix_caching
    write_model(run.folder / "model", mamba_d_state=16)
    assert not run(*flags).engine.prefix_caching
