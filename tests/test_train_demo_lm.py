"""The example that trains the demo model: it is that model, and it profiles and splits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3ForCausalLM

from elbowroom.pipeline.split import split
from elbowroom.training.layers import trace_model
from elbowroom.training.script import TrainingScript, load_script
from tests.pipeline.models import plan_of
from tests.pipeline.runs import assert_equal, run_model, run_stages

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"
SHIPPED = EXAMPLES / "demo" / "model"


@pytest.fixture(scope="module")
def script() -> TrainingScript:
    return load_script(EXAMPLES / "train_demo_lm.py")


@pytest.fixture(scope="module")
def accuracy(script: TrainingScript) -> Callable[[nn.Module], float]:
    measure: Callable[[nn.Module], float] = sys.modules[
        script.functions["loss_fn"].__module__
    ].accuracy
    return measure


def shipped_weights() -> dict[str, torch.Tensor]:
    """By the example's names."""
    named = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    weights = {}
    for name, tensor in load_file(SHIPPED / "model.safetensors").items():
        short = named.get(name) or name.replace("model.layers.", "block")
        weights[short] = tensor.float()
    return {**weights, "head.weight": weights["embed.weight"]}


def test_it_is_the_shipped_model(
    script: TrainingScript, accuracy: Callable[[nn.Module], float]
) -> None:
    model = script.make_model(0)
    model.load_state_dict(shipped_weights())
    shipped = Qwen3ForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    inputs, targets = script.make_batch(torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(inputs)
        torch.testing.assert_close(logits, shipped(inputs).logits, rtol=1e-3, atol=1e-3)
        assert accuracy(model) > 0.99
        # It knows the answers to these tasks: batch and loss are what it was trained with.
        assert script.loss_fn(logits, targets) < 0.1 < script.loss_fn(logits.roll(1, 0), targets)


def test_batches_come_from_the_generator(script: TrainingScript) -> None:
    one, other = (script.make_batch(torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(map(torch.equal, one, other))
    generator = torch.Generator().manual_seed(3)
    batches = [script.make_batch(generator)[0] for _ in range(2)]
    assert torch.equal(batches[0], one[0])
    assert not torch.equal(*batches)


def test_its_stages_are_the_model(script: TrainingScript) -> None:
    inputs, _ = script.make_batch(torch.Generator().manual_seed(1))
    model, twin = script.make_model(0), script.make_model(0)
    assert isinstance(model, nn.Sequential)
    traced = trace_model(model, inputs)
    names = [layer.name for layer in traced.layers]
    stages = split(traced, plan_of([names[:4], names[4:7], names[7:]]))
    assert [stage.passes for stage in stages] == [("block1",), ("block4",), ()]
    assert_equal(run_model(twin, inputs), run_stages(traced, stages, inputs))
