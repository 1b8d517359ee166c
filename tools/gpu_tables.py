"""Tables of what was measured on GPUs: no figure is copied by hand.

Each function returns one Markdown table; ``TABLES`` names them for ``tools.make_docs``.
"""

from __future__ import annotations

from collections.abc import Callable

from tools.results import load, ratios, table, where

_MODES = ("local", "streamed", "shipped")


def engine() -> str:
    """Replicas of vLLM on one GPU, of the same memory each, with and without a pool."""
    data = load("gpu_engine")
    rows = []
    for name in (key for key in data if key.endswith("replicas")):
        found = data[name]
        for pool in found["kv_tokens"]:
            speeds = [one[pool]["tokens_per_second"] for one in found["rounds"]]
            gains = [
                one[pool]["tokens_per_second"] / one["none"]["tokens_per_second"]
                for one in found["rounds"]
            ]
            rows.append(
                [
                    f"{name}, `{pool}`",
                    f"{found['kv_tokens'][pool]:,}",
                    f"{sum(speeds) / len(speeds):,.0f}",
                    "" if pool == "none" else ratios(gains),
                    f"{found['floor_tokens_per_second'][pool]:,.0f}",
                ]
            )
    head = (
        f"{data['gpus'][0]}, {where(data)}",
        "KV tokens of a replica",
        "output tokens/s",
        "over `none`",
    )
    return table((*head, "at most"), rows)


def layers() -> str:
    """Milliseconds of an iteration of decoder layers in plain torch, by rows."""
    data = load("gpu_pool")
    rows = []
    for name in (key for key in data if key.endswith("processes")):
        found = data[name]
        for mode in _MODES:
            floor = found["floor_seconds"].get(mode)
            seconds = found["seconds"][mode].values()
            rows.append(
                [
                    f"{name}, {mode}",
                    *(f"{1e3 * one:.1f}" for one in seconds),
                    "" if floor is None else f"{1e3 * floor:.1f}",
                ]
            )
    counts = next(data[key]["seconds"]["local"] for key in data if key.endswith("processes"))
    head = f"{data['device']}, {where(data)}"
    return table((head, *(f"{count} rows" for count in counts), "floor at 1 row"), rows)


TABLES: dict[str, Callable[[], str]] = {"gpu-engine": engine, "gpu-layers": layers}
