"""Options for vLLM, which stand behind ``--``: those that a plan depends on."""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.core.errors import InputError

_OURS = {
    ("--tensor-parallel-size", "-tp"): "give --tensor-parallel before --",
    ("--pipeline-parallel-size", "-pp"): "pipelines of stages are planned, and not run",
    ("--data-parallel-size", "-dp"): "give --replicas before --",
}
"""Options that would make of a replica what the plan does not know."""


def option_value(options: Sequence[str], *names: str) -> str | None:
    """The value of the last of ``options`` with one of these names; None where there is none."""
    found = None
    for word, following in zip(options, (*options, "")[1:], strict=True):
        name, has_value, value = word.partition("=")
        if name.replace("_", "-") in names:
            found = value if has_value else following
    return found


def check_options(options: Sequence[str]) -> None:
    """Raise InputError for options that are Elbowroom's own to set."""
    for names, instead in _OURS.items():
        value = option_value(options, *names)
        if value not in (None, "1"):
            raise InputError(f"{names[0]} {value} cannot stand behind --: {instead}")


def why_no_pool(options: Sequence[str]) -> str | None:
    """Why no pool can hold the layers of a model that vLLM loads with these options."""
    method = option_value(options, "--quantization", "-q")
    if method is not None:
        return f"--quantization {method} has vLLM quantise its weights"
    draft = option_value(options, "--speculative-config.model", "-sc.model")
    if draft or "model" in (option_value(options, "--speculative-config", "-sc") or ""):
        return "--speculative-config adds a model with layers of its own"
    return None
