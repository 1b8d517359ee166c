"""Models and pools that cannot be run: exit code 2, numbers and a way out, and nothing started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from elbowroom.app import runnable
from elbowroom.cli.main import main
from elbowroom.core import host
from elbowroom.engine.vllm_seam import kernels
from tests.cli.command import Command, check_refused
from tests.tiny_model import HIDDEN, INTERMEDIATE, LAYERS, Shapes, llama_shapes, write_model


@dataclass(frozen=True)
class Case:
    """A model folder's config and tensors, and flags for what runs otherwise."""

    words: str
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ()
    shapes: Callable[[], Shapes] = llama_shapes
    without: tuple[str, ...] = ()
    """Files of the folder that are missing."""


def mixture() -> Shapes:
    """Experts of a width that pools hold, without further numbers in the config."""
    shapes = {name: shape for name, shape in llama_shapes().items() if ".mlp." not in name}
    for layer in range(LAYERS):
        for name, shape in (("gate", (32, HIDDEN)), ("up", (32, HIDDEN)), ("down", (HIDDEN, 32))):
            for expert in range(4):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                shapes[key] = shape
    return shapes


def two_modules() -> Shapes:
    """A model whose layers have two feed-forward modules beside each other, as OPT's."""
    shapes = {name: s for name, s in llama_shapes().items() if ".mlp." not in name}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.fc1.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"model.layers.{layer}.fc2.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes


def without_ffn() -> Shapes:
    return {name: s for name, s in llama_shapes().items() if ".mlp." not in name}


MIXTURE = {
    "model_type": "qwen3_moe",
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
FP8_ROWS = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
        }
    },
}

TWO = {"replicas": "2"}
CASES = {
    "number": Case("'hidden_size' must be a positive integer, not -1", {"hidden_size": -1}),
    "layers": Case("10001 layers are more than 10000", {"num_hidden_layers": 10_001}),
    "no rows": Case(
        "rows of at most 1.28e-07 tokens are no rows",
        {"rope_scaling": {"rope_type": "linear", "factor": 1e-9}},
    ),
    "dtype": Case("dtype 'int4' is not one of bfloat16, float16, float32", {"dtype": "int4"}),
    "float16": Case(
        "computes a 'gemma2' in bfloat16 or float32 only",
        {"model_type": "gemma2"},
        {"dtype": "float16"},
    ),
    "bits": Case(
        "weights of 99 bits are not known",
        {"quantization_config": {"quant_method": "gptq", "bits": 99}},
    ),
    "number of experts": Case("names no number of experts", shapes=mixture),
    "no config": Case("config.json", without=("config.json",)),
    "no weights": Case("has no weights: download", without=("model.safetensors",)),
    "no tokenizer": Case(
        "has no tokenizer: download the whole model, or name one with -- --tokenizer",
        without=("tokenizer_config.json",),
    ),
    "float32 of AWQ": Case(
        "vLLM computes awq weights in bfloat16 or float16 only",
        {"quantization_config": AWQ},
        {"dtype": "float32"},
    ),
    "a pool of nobody": Case(
        "give --replicas 2 or more", flags={"pool": "mapped", "replicas": "1"}
    ),
    "heads": Case(
        "--tensor-parallel 3 does not divide the 4 attention heads of model, or the 2 of keys",
        flags={"tensor_parallel": "3"},
    ),
    "slots of a mapped pool": Case(
        "no layout is as all of these options want it",
        flags={**TWO, "pool": "mapped", "slots": "2"},
    ),
    "shipped, of two modules": Case(
        "Use --pool mapped, streamed or none", {}, {**TWO, "pool": "shipped"}, shapes=two_modules
    ),
    "divided mixture": Case(
        "Leave out --tensor-parallel, or use --pool none",
        MIXTURE,
        {**TWO, "pool": "mapped", "tensor_parallel": "2"},
        shapes=mixture,
    ),
    "memory": Case("--memory gives 64 MiB. Give --memory at least", {"vocab_size": 10**9}),
    "ranks behind": Case(
        "--tensor-parallel-size 2 cannot stand behind --: give --tensor-parallel",
        behind=("-tp", "2"),
    ),
    "stages behind": Case(
        "--pipeline-parallel-size 3 cannot stand behind --", behind=("--pipeline_parallel_size=3",)
    ),
}


def spoiled(command: Command, case: Case) -> Command:
    """The command with the model of a case."""
    folder = command.folder / "model"
    write_model(folder, case.shapes(), **case.config)
    for name in case.without:
        (folder / name).unlink()
    command.before = command.files()
    return command


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused(command: Command, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    check_refused(spoiled(command, case), capsys, case.words, *case.behind, **case.flags)


POOLS = ("mapped", "streamed", "shipped")
UNPOOLED = {
    "no layer with a network": Case("none of its 3 layers has", shapes=without_ffn),
    "quantised weights": Case("quantised (compressed-tensors)", {"quantization_config": FP8_ROWS}),
    "quantised by vLLM": Case("--quantization fp8 has vLLM", behind=("--quantization", "fp8")),
    "draft model": Case(
        "a model with layers of its own",
        behind=("--speculative-config", '{"method": "draft_model", "model": "d"}'),
    ),
    "draft model by its name": Case(
        "a model with layers of its own", behind=("--speculative_config.model=d",)
    ),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("case", UNPOOLED.values(), ids=UNPOOLED)
def test_a_pool_that_is_asked_for_in_vain(
    command: Command, capsys: pytest.CaptureFixture[str], case: Case, pool: str
) -> None:
    """Whatever kinds of model no pool can hold: the reason, and the way out."""
    flags = {**TWO, "pool": pool}
    check_refused(spoiled(command, case), capsys, case.words, *case.behind, **flags)
    assert main_says(command, capsys, case, **flags).endswith("Use --pool none")


def main_says(
    command: Command, capsys: pytest.CaptureFixture[str], case: Case, **flags: str
) -> str:
    command.run(*case.behind, **flags)
    return " ".join(capsys.readouterr().err.split())


class NoKernels:
    """An old CPU."""

    has_amx = False

    def has_operator(self, name: str) -> bool:
        return name == "onednn_scaled_mm"


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runnable, "is_known_engine", lambda _: True)
    monkeypatch.setattr(kernels, "own_kernels", NoKernels)


def pack(folder: Path) -> None:
    """Have all tensors stored as those of quantised matrices are: not in a plain dtype."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype": "BF16"', b'"dtype": "I16" '))


NO_KERNEL = {
    "awq": (AWQ, llama_shapes, "4-bit integers (awq), for which vLLM has no kernel on this CPU"),
    "fp8": (FP8, llama_shapes, "FP8 with one scale for a whole matrix (fp8)"),
    "experts": (FP8_ROWS, mixture, "FP8 with a scale for each row (compressed-tensors)"),
}


@pytest.mark.parametrize("pool", ["none", *POOLS])
@pytest.mark.parametrize(("config", "shapes", "words"), NO_KERNEL.values(), ids=NO_KERNEL)
def test_weights_without_a_kernel_are_refused_in_every_pool(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    old_cpu: None,
    config: dict[str, Any],
    shapes: Callable[[], Shapes],
    words: str,
    pool: str,
) -> None:
    is_mixture = shapes is mixture
    case = Case(words, {**(MIXTURE if is_mixture else {}), "quantization_config": config})
    write_model(command.folder / "model", shapes(), **case.config)
    pack(command.folder / "model")
    command.before = command.files()
    check_refused(command, capsys, words, **TWO, pool=pool)
    said = main_says(command, capsys, case, **TWO, pool=pool)
    assert "--pool none" not in said, "that would not help"
    assert "bfloat16, float16 or float32" in said
    assert ("8-bit integers with 8-bit activations" in said) != is_mixture


def test_plans_for_other_clusters_ask_for_no_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old_cpu: None
) -> None:
    model = write_model(tmp_path / "model", quantization_config=AWQ)
    pack(model)
    job = ("--model", str(model), "--lengths", "8:8x4")
    assert main(["plan", *job, "--cluster", "h100-1"]) == 0
    assert main(["plan", *job]) == 2
    assert "no kernel on this CPU" in " ".join(capsys.readouterr().err.split())


def test_what_vllm_is_told_of_weights_is_left_to_it(
    command: Command, capsys: pytest.CaptureFixture[str], old_cpu: None
) -> None:
    write_model(command.folder / "model", quantization_config=AWQ)
    pack(command.folder / "model")
    with pytest.raises(pytest.fail.Exception, match="the job was started"):
        command.run("--quantization", "other", pool="none")


def test_a_pool_without_room(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "free_bytes", lambda _: 1024)
    words = "of files in memory, and"
    check_refused(command, capsys, words, **TWO, pool="mapped", dtype="bfloat16")
    said = main_says(command, capsys, Case(words), **TWO, pool="mapped", dtype="bfloat16")
    assert "has 1 KiB" in said
    assert "--pool none" in said
    with pytest.raises(pytest.fail.Exception, match="the job was started"):
        command.run(**TWO, pool="none")
