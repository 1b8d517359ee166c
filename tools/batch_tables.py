"""Tables of results about batch inference, and the README's summary: no figure is copied by hand.

Each function returns one Markdown table; ``TABLES`` names them for ``tools.make_docs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.results import all_of, load, over, ratios, table, where


def default_run() -> str:
    """The default run against vLLM's own batch runner."""
    data = load("default_run")

    def speed(part: str, seconds: str) -> str:
        rounds = data[part]["rounds"]
        return ratios(each["vllm"][seconds] / each["elbowroom"][seconds] for each in rounds)

    plain = "32 rows of 256-512 prompt tokens"
    shared = "400 rows, 8 shared prefixes in random order"
    return table(
        (where(data), "Elbowroom over `vllm run-batch`: median (rounds)"),
        (
            (f"{plain}: output tokens/s once started", speed("plain", "run_seconds")),
            (f"{plain}: the whole command", speed("plain", "total_seconds")),
            (f"{shared}: output tokens/s once started", speed("prefixes", "run_seconds")),
            (f"{shared}: the whole command", speed("prefixes", "total_seconds")),
        ),
    )


def against() -> str:
    """Speed against an earlier version, by the newest measurement of each part."""
    names = {
        "run": "rows/s with an engine that takes no time",
        "check": "`check`, lines/s",
        "start": "start of 2 replicas",
    }
    newest: dict[str, dict[str, Any]] = {}
    for data in all_of("against"):
        newest |= {part: data for part in names if part in data}
    rows = []
    for part, data in newest.items():
        versions = f"{data['date']}, commit {data['commit'][:7]} over {data['against'][:7]}"
        pairs = data[part]["seconds_before_and_now"]
        rows.append((f"{names[part]} ({versions})", ratios(before / now for before, now in pairs)))
    return table(("one version over an earlier one", "median (rounds)"), rows)


def pool() -> str:
    """The pool against full copies, on cores that stand in for devices."""
    tight, ample, plain = (load(f"pool_throughput_{kind}") for kind in ("tight", "ample", "plain"))
    start = load("start_up")
    kv = tight["kv_tokens"]
    lost = []
    for each in ample["rounds"]:
        seconds = each["streamed"]["run_seconds"] - each["none"]["run_seconds"]
        lost.append(
            seconds * each["copy_bytes_per_second"] / max(each["streamed"]["streamed_bytes"])
        )
    starts = [each["two_replicas_seconds"] / each["one_vllm_seconds"] for each in start["rounds"]]
    return table(
        (where(tight), "median (rounds)"),
        (
            (
                "KV tokens, mapped pool over full copies",
                f"{tight['kv_tokens_mapped_over_none']:.2f}x "
                f"({kv['mapped']:,} over {kv['none']:,})",
            ),
            (
                "output tokens/s, mapped pool over full copies",
                over(tight["rounds"], "mapped", "none"),
            ),
            (
                "output tokens/s, streamed pool over full copies",
                over(tight["rounds"], "streamed", "none"),
            ),
            (
                "with ample memory and equal batches: output tokens/s, mapped over full copies",
                over(ample["rounds"], "mapped", "none"),
            ),
            (
                "with ample memory: time lost to streaming, over the minimum "
                "(bytes copied / copy bandwidth)",
                ratios(lost),
            ),
            ("seconds to start 2 replicas, over one vLLM on the same cores", ratios(starts)),
            (
                "output tokens/s, mapped pool over two `vllm run-batch` engines of one core each, "
                "same memory",
                over(plain["rounds"], "mapped", "two_engines"),
            ),
            (
                "output tokens/s, mapped pool over one `vllm run-batch` engine with both cores "
                "and all the memory",
                over(plain["rounds"], "mapped", "one_engine"),
            ),
        ),
    )


def shipping() -> str:
    """Small batches shipped to the owner, against layers streamed to the batch."""
    data, tails = load("shipping"), load("tail")
    held, free = data["throttled to 1 GB/s"], data["not throttled"]
    serving = ", ".join(
        f"{found['19_of_20']:.1f}x ({rows} row{'s' if rows != '1' else ''})"
        for rows, found in held["serving"].items()
    )
    heavy, flat = (tails[kind]["shipping_gains"] for kind in ("heavy tail", "no tail"))
    return table(
        (where(data), ""),
        (
            (
                "link held to 1 GB/s, 1 row in each of 2 replicas: seconds of an iteration, "
                "streamed over shipped",
                f"{held['ship_over_stream_at_1_row']:.1f}x",
            ),
            (
                "the same: speed, shipped over full copies (best possible: 1)",
                f"{held['ship_over_local_at_1_row']:.2f}x",
            ),
            (
                "batch from which streaming is faster than shipping, measured and planned",
                f"{held['crossover_rows']:.0f}, {held['planned_rows']} rows (1 GB/s); "
                f"{free['crossover_rows']:.0f}, {free['planned_rows']} rows (memory copies)",
            ),
            (
                "64 rows, link not held: speed, streamed over shipped",
                f"{free['stream_over_ship_at_64_rows']:.2f}x",
            ),
            (
                "owner's own FFN latency while it serves a peer, p95, over idle "
                "(target: at most 2x)",
                serving,
            ),
            (
                "job with a heavy tail, 1 GB/s: seconds without shipping over with it; "
                "the last tenth of its rows",
                f"{heavy['run_seconds']:.2f}x; {heavy['tail_seconds']:.1f}x",
            ),
            ("job without a tail, 1 GB/s: the same", f"{flat['run_seconds']:.2f}x"),
        ),
    )


def jobs() -> str:
    """Reading, checking, journaling and ordering rows."""
    data, million, order = (
        load(name) for name in ("jobs_throughput", "jobs_throughput_million", "prefix_order")
    )
    first = order["rounds"][0]
    return table(
        (where(data), ""),
        (
            (
                "`check`: lines of 1 KB a second",
                f"{data['check_rows_per_second']:,.0f} (peak "
                f"{data['check_peak_bytes'] / 1e6:.0f} MB at {data['rows']:,} lines; "
                f"reading alone: {data['read_rows_per_second']:,.0f})",
            ),
            (
                "journal, dispatch and publish with an engine that takes no time: rows a second",
                f"{data['run_rows_per_second']:,.0f} ({million['run_rows_per_second']:,.0f} at "
                f"{million['run_rows']:,} rows, peak {million['run_peak_bytes'] / 1e6:.0f} MB)",
            ),
            (
                f"{order['rows']} rows with {order['prefixes']} shared prefixes in random order: "
                "cached prompt tokens, over a sorted file",
                f"{order['hit_tokens_auto_over_sorted']:.2f}x "
                f"(`--order input`: {order['hit_tokens_input_over_sorted']:.2f}x)",
            ),
            (
                "the same: seconds in all, over `--order input`",
                f"{order['total_seconds_auto_over_input']:.2f}x "
                f"({first['auto']['total_seconds']:.0f} s, "
                f"{first['input']['total_seconds']:.0f} s)",
            ),
        ),
    )


def predictions() -> str:
    """What was predicted, beside what came."""
    speed, kv, training, planning = (
        load(name) for name in ("prediction_speed", "prediction_kv", "training", "planning_time")
    )
    rounds = " / ".join(
        ", ".join(
            f"{each[mode]['predicted'] / each[mode]['outcome']:.2f}" for each in speed["rounds"]
        )
        for mode in ("none", "mapped", "streamed")
    )
    models = sorted({run["model"] for run in kv["runs"]})
    measured = ", ".join(f"{each['measured_over_simulated']:.2f}" for each in training["rounds"])
    return table(
        (where(speed), ""),
        (
            (
                f"predicted over measured output tokens/s, full copies / mapped / streamed, "
                f"{len(speed['rounds'])} rounds of {speed['rows']} rows",
                rounds,
            ),
            (
                "pairs of layouts ranked right",
                f"{speed['pairs_ranked'] - speed['pairs_ranked_wrong']} of {speed['pairs_ranked']}",
            ),
            (
                f"largest error of predicted KV tokens, {', '.join(models)}, 2 layouts",
                f"{kv['largest_error']:.0%}",
            ),
            (
                f"training in 2 stages on 2 cores ({training['date']}): seconds a minibatch, "
                f"measured over simulated, {len(training['rounds'])} rounds",
                measured,
            ),
            (
                "seconds to `plan`: 8 devices; 1,024 devices; to simulate 100,000 rows on 8 "
                "replicas",
                f"{planning['search_seconds_8_devices']:.1f}; "
                f"{planning['search_seconds_1024_devices']:.1f}; "
                f"{planning['simulate_seconds_100000_rows']:.1f}",
            ),
        ),
    )


def summary() -> str:
    """The one table of the README."""
    tight, plain, order, training = (
        load(name)
        for name in ("pool_throughput_tight", "pool_throughput_plain", "default_run", "peers")
    )
    held, tail = load("shipping")["throttled to 1 GB/s"], load("tail")["heavy tail"]
    vgg, gpt = (
        training[model]["1 Gbit/s"]["over_best_peer"]["median"]
        for model in ("vgg_like", "gpt_like")
    )
    return table(
        (f"measured on {tight['machine']['cores']} CPU cores", "median"),
        (
            (
                "default run over `vllm run-batch`: output tokens/s, 32 unrelated rows",
                f"{order['plain']['answering_over_vllm']:.2f}x",
            ),
            (
                "the same, 400 rows that share 8 prefixes, in random order",
                f"{order['prefixes']['answering_over_vllm']:.2f}x",
            ),
            (
                "mapped pool over full copies, 2 replicas, scarce memory: KV tokens",
                f"{tight['kv_tokens_mapped_over_none']:.2f}x",
            ),
            ("the same: output tokens/s", f"{tight['mapped_over_none']:.2f}x"),
            (
                "mapped pool, 2 replicas of one core, over one vLLM engine on both cores: "
                "output tokens/s",
                f"{plain['mapped_over_one_engine_with_everything']:.2f}x",
            ),
            (
                "1 GB/s link, 1 row in each replica: shipped pool over streamed pool, iterations/s",
                f"{held['ship_over_stream_at_1_row']:.1f}x",
            ),
            (
                "1 GB/s link, job with a heavy tail: shipped pool over streamed pool",
                f"{tail['shipping_gains']['run_seconds']:.2f}x",
            ),
            (
                "training in 2 stages over 1 Gbit/s, over the better of DistributedDataParallel "
                "and torch.distributed.pipelining: VGG, GPT",
                f"{vgg:.2f}x, {gpt:.2f}x",
            ),
        ),
    )


def published() -> str:
    """Plans against what others measured."""
    data = load("published_throughput")
    rows = [
        (
            f"{each['model']} on {each['cluster']}, {each['layout']}",
            f"{each['published']:,}",
            f"{each['planned']:,}",
            f"{each['planned_over_published']:.2f}x",
        )
        for each in data["figures"]
    ]
    commit = f"{data['date']}, commit {data['commit'][:7]}"
    sources = sorted({each["source"] for each in data["figures"]})
    made = table((commit, "published", "planned", "planned over published"), rows)
    return f"{made}\n\nSources: {'; '.join(f'`{source}`' for source in sources)}."


TABLES: dict[str, Callable[[], str]] = {
    "default-run": default_run,
    "against": against,
    "pool": pool,
    "shipping": shipping,
    "jobs": jobs,
    "predictions": predictions,
    "published": published,
    "summary": summary,
}
