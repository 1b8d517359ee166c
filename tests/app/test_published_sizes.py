"""Sizes of public models from their configs alone, against what their makers publish.

Bytes are ``metadata.total_size`` of the index on the hub, or as a row says. Parameters are as the
model cards round them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from math import floor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from elbowroom.app.architecture import built_tensors
from elbowroom.cli.main import main
from elbowroom.core.model import ModelFacts, read_model
from elbowroom.core.parameters import count_parameters
from tests.planning.facts import CONFIGS, MODELS

DEEPSEEK_MTP = 11_500_000_000 + 2 * 7168 * (2 * 129_280 + 2 * 7168)
"""Bytes of the layer that predicts a second token, which vLLM does not load: 11.5B parameters of 8
bits; in bfloat16 copies of embedding and head, and the matrix that joins two hidden states
(README_WEIGHTS.md of deepseek-ai/DeepSeek-V3)."""

QWEN3_FP8_ELEMENTS, QWEN3_FP8_SCALES = 235_107_904_512, 14_269_952
"""Numbers in the files of Qwen3-235B-A22B-Instruct-2507-FP8, as the hub counts them: 14,269,952
more than in those of Qwen3-235B-A22B. These are its scales, one for 128 x 128 weights of a byte
each; all else takes two."""

_META_ATTENTION = [
    f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(126) for part in "qkvo"
]
_META_ENDS = [
    f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 125) for part in ("gate", "up", "down")
]
META_FP8 = {
    "quant_method": "fbgemm_fp8",
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": [*_META_ENDS, *_META_ATTENTION],
}
"""How Meta quantises: feed-forward networks of all layers but the first and the last, and nothing
else (meta-llama/llama-stack, ``inference/quantization/loader.py``). Its config names the modules
that are left out one by one."""


@dataclass(frozen=True)
class Published:
    """What is known of a model. ``total`` and ``active`` are as ``card`` has them, card or paper.

    ``kv_bytes`` are of a token in all layers, in bfloat16; ``kv_reserved`` is given where vLLM pads
    groups of layers to one size. ``counts_embedding`` says that ``active`` includes the embedding.
    ``within`` is how exactly the bytes are known; headers of files are a part in 100,000.
    """

    config: str
    num_bytes: int
    kv_bytes: int
    total: str
    card: str
    active: str | None = None
    counts_embedding: bool = True
    quantization: dict[str, Any] | None = None
    kv_reserved: int | None = None
    within: float = 1e-5

    @property
    def name(self) -> str:
        method = f"-{self.quantization['quant_method']}" if self.quantization else ""
        return self.config + method


PUBLISHED = [
    Published(
        "Qwen3-30B-A3B",
        num_bytes=61_064_245_248,
        kv_bytes=48 * 2 * 4 * 128 * 2,
        total="30.5B",
        active="3.3B",  # 3.353, cut
        card="huggingface.co/Qwen/Qwen3-30B-A3B",
    ),
    Published(
        "qwen3-235b-a22b",
        num_bytes=470_187_269_120,
        kv_bytes=94 * 2 * 4 * 128 * 2,
        total="235B",
        active="22B",
        card="huggingface.co/Qwen/Qwen3-235B-A22B",
    ),
    Published(
        "qwen3-235b-a22b-fp8",
        num_bytes=2 * QWEN3_FP8_ELEMENTS - QWEN3_FP8_SCALES * 128 * 128,
        within=2e-4,  # scales of 2 bytes here, of 4 in a plan
        kv_bytes=94 * 2 * 4 * 128 * 2,
        total="235B",
        active="22B",
        card="huggingface.co/Qwen/Qwen3-235B-A22B-FP8",
    ),
    Published(
        "Mixtral-8x7B",
        num_bytes=93_405_585_408,
        kv_bytes=32 * 2 * 8 * 128 * 2,
        total="46.7B",
        active="12.9B",
        card="mistral.ai/news/mixtral-of-experts",
    ),
    Published(
        "deepseek-v3",
        num_bytes=688_586_727_753 - DEEPSEEK_MTP,  # the files, with their headers
        within=1e-4,  # 11.5B are rounded
        kv_bytes=70_272,  # "70.272 KB", arXiv 2505.09343, table 1
        total="671B",
        active="37B",
        card="huggingface.co/deepseek-ai/DeepSeek-V3",
        counts_embedding=False,  # 36.7B in README_WEIGHTS.md
    ),
    Published(
        "gpt-oss-120b",
        num_bytes=65_248_815_744,
        kv_bytes=36 * 2 * 8 * 64 * 2,
        total="116.83B",
        active="5.13B",
        card="arXiv 2508.10925, table 1",
        counts_embedding=False,  # below the table
    ),
    Published(
        "gpt-oss-20b",
        num_bytes=13_761_264_768,
        kv_bytes=24 * 2 * 8 * 64 * 2,
        total="20.91B",
        active="3.61B",
        card="arXiv 2508.10925, table 1",
        counts_embedding=False,
    ),
    Published(
        "gemma-3-27b-it",
        num_bytes=54_864_980_440,  # the files, with their headers
        kv_bytes=62 * 2 * 16 * 128 * 2,
        kv_reserved=70 * 2 * 16 * 128 * 2,  # 10 layers attend to all tokens: 7 groups of 10
        total="27.432406640B",
        card="huggingface.co/google/gemma-3-27b-it, the hub's count",
    ),
    Published(
        "llama-4-scout",
        num_bytes=217_283_738_720,  # the files, with their headers
        kv_bytes=48 * 2 * 8 * 128 * 2,
        total="109B",
        active="17B",
        card="huggingface.co/meta-llama/Llama-4-Scout-17B-16E-Instruct",
    ),
    Published(
        "llama-3.1-405b-fp8",
        num_bytes=454 * 2**30,  # "454 GB", AWS: Reducing LLM cold-start times on Amazon EKS
        within=1e-3,
        kv_bytes=516_096,  # "516.096 KB", arXiv 2505.09343, table 1
        total="405.853388800B",
        card="huggingface.co/meta-llama/Llama-3.1-405B, the hub's count",
        quantization=META_FP8,
    ),
]
rows = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)


@rows
def test_bytes_are_those_of_the_files(row: Published) -> None:
    model = facts(row.name)
    num_bytes = sum(model.ffn_bytes()) + model.replicated_bytes()
    assert num_bytes == pytest.approx(row.num_bytes, rel=row.within)


@rows
def test_kv_bytes_of_a_token(row: Published) -> None:
    model = facts(row.name)
    assert model.attention.is_known
    assert model.num_layers * model.attention.layer_elements() * 2 == row.kv_bytes
    assert model.kv_bytes_per_token() == (row.kv_reserved or row.kv_bytes)


@rows
def test_parameters_are_those_of_the_card(row: Published) -> None:
    counts = count_parameters(facts(row.name))
    assert is_rounded(counts.total, row.total)
    if row.active is not None:
        assert is_rounded(counts.active if row.counts_embedding else counts.multiplied, row.active)


@pytest.mark.parametrize("name", ["gpt-oss-120b", "Qwen3-30B-A3B", "llama-4-scout"])
def test_plan_prints_them(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in PUBLISHED if row.config == name)
    write_config(row, tmp_path)
    flags = ("--lengths", "1000:100x10", "--cluster", "h200-4", "--replicas", "1")
    assert main(["plan", "--model", str(tmp_path), *flags]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    shown = [float(number) for number in re.findall(r"([\d.]+)B", header)]
    counts = count_parameters(facts(row.name))
    assert shown == [pytest.approx(count / 1e9, rel=0.0005) for count in counts]
    gib = re.search(r"([\d.]+) GiB", header)
    assert gib is not None
    assert float(gib[1]) * 2**30 == pytest.approx(row.num_bytes, rel=0.001)


def test_only_a_mixture_has_active_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--lengths", "1000:100x10", "--cluster", "h200-2", "--replicas", "1")
    assert main(["plan", "--model", str(MODELS / "Llama-3.1-70B"), *flags]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert "70.55B parameters, 131.4 GiB)" in header
    assert "active" not in header


def is_rounded(number: int, text: str) -> bool:
    """Whether a count in billions is a text such as ``3.3B``, rounded or cut to its digits."""
    digits = text.removesuffix("B")
    scale = 10 ** len(digits.partition(".")[2])
    scaled = number / 1e9 * scale
    return round(float(digits) * scale) in (round(scaled), floor(scaled))


@cache
def facts(name: str) -> ModelFacts:
    row = next(row for row in PUBLISHED if row.name == name)
    with TemporaryDirectory() as folder:
        write_config(row, Path(folder))
        return read_model(Path(folder), build=built_tensors)


def write_config(row: Published, folder: Path) -> None:
    """The config of a row as a model folder has it."""
    path = CONFIGS / f"{row.config}.json"
    if not path.exists():
        path = MODELS / row.config / "config.json"
    config = json.loads(path.read_text())
    if row.quantization is not None:
        config["quantization_config"] = row.quantization
    (folder / "config.json").write_text(json.dumps(config))
