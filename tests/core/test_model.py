"""Facts of a model folder: what is counted, and every way in which a folder is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from tools.make_model import make_model

from elbowroom.core.errors import InputError, UnsupportedModelError
from elbowroom.core.model import check_runnable, read_model
from tests.tiny_model import (
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    VOCAB,
    llama_shapes,
    safetensors_bytes,
    with_header,
    write_model,
)

FFN = 3 * HIDDEN * INTERMEDIATE
REST = 2 * VOCAB * HIDDEN + HIDDEN + LAYERS * HIDDEN * HIDDEN


def test_counts_every_element_once(tmp_path: Path) -> None:
    facts = read_model(write_model(tmp_path / "tiny"))
    assert facts.name == "tiny"
    assert facts.ffn_elements == (FFN,) * LAYERS
    assert facts.rest.elements == REST
    assert facts.ffn_bytes() == (2 * FFN,) * LAYERS
    assert facts.replicated_bytes() == 2 * REST
    assert facts.kv_bytes_per_token() == 2 * LAYERS * 2 * 2 * 2


def test_tied_head_is_not_counted_twice(tmp_path: Path) -> None:
    facts = read_model(write_model(tmp_path, tie_word_embeddings=True))
    assert facts.rest.elements == REST - VOCAB * HIDDEN


def test_biases_are_replicated(tmp_path: Path) -> None:
    shapes = {**llama_shapes(), "model.layers.0.mlp.up_proj.bias": (INTERMEDIATE,)}
    facts = read_model(write_model(tmp_path, shapes))
    assert facts.ffn_elements[0] == FFN
    assert facts.rest.elements == REST + INTERMEDIATE


@pytest.mark.parametrize("stem", ["transformer.h", "model.layers", "transformer.blocks"])
@pytest.mark.parametrize("ffn", ["mlp", "feed_forward", "ffn"])
def test_knows_other_names(tmp_path: Path, stem: str, ffn: str) -> None:
    shapes = {f"{stem}.{layer}.{ffn}.c_fc.weight": (4, 8) for layer in range(LAYERS)}
    facts = read_model(write_model(tmp_path, shapes))
    assert facts.ffn_elements == (32,) * LAYERS
    assert facts.rest.elements == 0


def test_reads_shards_through_the_index(tmp_path: Path) -> None:
    write_model(tmp_path)
    shapes = list(llama_shapes().items())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes(dict(shapes[:5])))
    (tmp_path / "two.safetensors").write_bytes(safetensors_bytes(dict(shapes[5:])))
    (tmp_path / "not-listed.safetensors").write_bytes(b"rubbish")
    weight_map = {name: "one.safetensors" for name, _ in shapes[:5]}
    weight_map |= {name: "two.safetensors" for name, _ in shapes[5:]}
    _write_index(tmp_path, {"metadata": {"total_size": -1}, "weight_map": weight_map})
    facts = read_model(tmp_path)
    assert facts.ffn_elements == (FFN,) * LAYERS
    assert facts.rest.elements == REST


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float16"),
        ("float32", "auto", "bfloat16"),
        (None, "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float64", "float16", "float16"),
    ],
)
def test_dtype_rules(tmp_path: Path, own: str | None, asked: str, expected: str) -> None:
    facts = read_model(write_model(tmp_path, dtype=own), asked)
    assert facts.dtype == expected
    assert facts.ffn_bytes()[0] == FFN * (4 if expected == "float32" else 2)


def test_old_name_of_dtype(tmp_path: Path) -> None:
    assert read_model(write_model(tmp_path, dtype=None, torch_dtype="float16")).dtype == "float16"


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype 'int4'"):
        read_model(write_model(tmp_path, dtype="int4"))


def test_defaults_of_missing_keys(tmp_path: Path) -> None:
    facts = read_model(write_model(tmp_path, num_key_value_heads=None, head_dim=None))
    assert (facts.num_kv_heads, facts.attention.head_elements) == (4, 2 * HIDDEN // 4)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        read_model(tmp_path / "none")


def test_missing_config(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        read_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", "[" * 100_000])
def test_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json"):
        read_model(tmp_path)


@pytest.mark.parametrize("value", [None, 0, -1, "3", 1.5, [3]])
def test_config_numbers_are_checked(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match="'num_hidden_layers' must be a positive integer"):
        read_model(write_model(tmp_path, model_type="novel", num_hidden_layers=value))


def test_code_in_the_folder_is_not_needed_and_not_run(tmp_path: Path) -> None:
    plain = read_model(write_model(tmp_path))
    assert read_model(write_model(tmp_path, auto_map={"AutoModel": "evil.Model"})) == plain


def test_unknown_type_without_safetensors(tmp_path: Path) -> None:
    write_model(tmp_path, model_type="novel")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match=r"has no \.safetensors files"):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a", "..", ".", ""])
def test_index_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes(llama_shapes()))
    _write_index(tmp_path / "model", {"weight_map": {"a": name}})
    with pytest.raises(InputError, match="outside the model folder"):
        read_model(tmp_path / "model")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_a_map(tmp_path: Path, index: object) -> None:
    _write_index(write_model(tmp_path), index)
    with pytest.raises(InputError, match="weight_map"):
        read_model(tmp_path)


def test_shard_of_the_index_is_missing(tmp_path: Path) -> None:
    _write_index(write_model(tmp_path), {"weight_map": {"a": "gone.safetensors"}})
    with pytest.raises(InputError, match=r"cannot read .*gone\.safetensors"):
        read_model(tmp_path)


GOOD = safetensors_bytes(llama_shapes())
ENTRY = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}


def _one_entry(**changes: object) -> bytes:
    entry = {key: value for key, value in {**ENTRY, **changes}.items() if value is not None}
    return with_header(json.dumps({"a": entry}).encode(), 8)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:5], id="torn in the length"),
        pytest.param(GOOD[:40], id="torn in the header"),
        pytest.param(GOOD[:-1], id="torn in the weights"),
        pytest.param(GOOD + b"\0", id="a byte too many"),
        pytest.param(struct.pack("<Q", 1 << 60) + GOOD[8:], id="header too long"),
        pytest.param(b"\x80\x04" + bytes(range(256)) * 4, id="a pickle"),
        pytest.param(with_header(b"{not json", 0), id="header is not JSON"),
        pytest.param(with_header(b"\xff\xfe{}", 0), id="header is not UTF-8"),
        pytest.param(with_header(b"[1, 2]", 0), id="header is a list"),
        pytest.param(with_header(b"[" * 100_000, 0), id="header is nested deeply"),
        pytest.param(with_header(b'{"a": 1}', 8), id="entry is a number"),
        pytest.param(_one_entry(data_offsets=None), id="entry without offsets"),
        pytest.param(_one_entry(data_offsets=[0, "8"]), id="offset is text"),
        pytest.param(_one_entry(shape=None), id="entry without shape"),
        pytest.param(_one_entry(shape=4), id="shape is a number"),
        pytest.param(_one_entry(shape=["4"]), id="shape of text"),
    ],
)
def test_corrupt_weights_are_refused(tmp_path: Path, data: bytes) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors is corrupt: .*download"):
        read_model(tmp_path)


def test_models_without_feed_forward_are_not_pooled(tmp_path: Path) -> None:
    """Some layers of a hybrid have none; some models have none at all."""
    some = {name: s for name, s in llama_shapes().items() if "layers.1.mlp" not in name}
    hybrid = write_model(tmp_path / "hybrid", some)
    assert [bool(weights.elements) for weights in read_model(hybrid).ffn] == [True, False, True]
    check_runnable(read_model(hybrid), hybrid, "mapped")
    shapes = {name: s for name, s in llama_shapes().items() if "mlp" not in name}
    mixer = write_model(tmp_path / "mixer", shapes)
    check_runnable(read_model(mixer), mixer, "none")
    with pytest.raises(UnsupportedModelError, match="none of its 3 layers has feed-forward"):
        check_runnable(read_model(mixer), mixer, "mapped")


def test_modules_beside_each_other_are_pooled_and_not_shipped(tmp_path: Path) -> None:
    names = {"mlp.gate_proj": "fc1", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2"}
    shapes = llama_shapes()
    for name in list(shapes):
        for old, new in names.items():
            if old in name:
                shapes[name.replace(old, new)] = shapes.pop(name)
    facts = read_model(write_model(tmp_path, shapes))
    assert facts.cannot_pool is None
    assert facts.cannot_ship == "its layers have several feed-forward modules"


def test_layers_that_are_nothing_but_mixers(tmp_path: Path) -> None:
    """Nemotron-H calls attention, state spaces and feed-forward networks the same."""
    shapes = {name: s for name, s in llama_shapes().items() if ".layers." not in name}
    ffn = {"up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
    others = {"in_proj": (HIDDEN, HIDDEN), "q_proj": (HIDDEN, HIDDEN)}
    for layer, parts in enumerate((others, ffn, others, ffn)):
        shapes |= {f"backbone.layers.{layer}.mixer.{name}.weight": s for name, s in parts.items()}
    kinds = ["mamba", "mlp", "attention", "mlp"]
    folder = write_model(tmp_path, shapes, model_type="nemotron_h", layers_block_type=kinds)
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"]  # as Transformers writes it
    (folder / "config.json").write_text(json.dumps(config))
    size = 2 * HIDDEN * INTERMEDIATE
    assert read_model(folder).ffn_elements == (0, size, 0, size)


def test_modules_that_give_more_than_rows_are_pooled_and_not_shipped(tmp_path: Path) -> None:
    facts = read_model(write_model(tmp_path, model_type="falcon"))
    assert facts.cannot_pool is None
    assert facts.cannot_ship is not None


@pytest.mark.parametrize(
    ("quantization", "is_pooled"),
    [
        ({"type": "float", "num_bits": 8, "strategy": "channel"}, True),
        ({"type": "float", "num_bits": 8, "strategy": "tensor"}, False),
        ({"type": "int", "num_bits": 8, "strategy": "channel"}, False),
        ({"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}, False),
    ],
)
def test_quantised_weights_that_stay_tensors_are_pooled(
    tmp_path: Path, quantization: dict[str, object], is_pooled: bool
) -> None:
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "weights": quantization,
                "input_activations": {"num_bits": 8, "dynamic": True},
            }
        },
    }
    write_model(tmp_path, quantization_config=config)
    (tmp_path / "model.safetensors").unlink()  # what follows from the config
    facts = read_model(tmp_path)
    assert (facts.cannot_pool is None) == is_pooled
    if not is_pooled:
        assert facts.cannot_pool == "its weights are quantised (compressed-tensors)"


@pytest.mark.parametrize("part", ["block_sparse_moe.experts.0.w1", "mlp.experts.0.gate_proj"])
def test_mixtures_are_counted_without_their_routers(tmp_path: Path, part: str) -> None:
    shapes = {name: s for name, s in llama_shapes().items() if ".mlp." not in name}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.{part.split('.')[0]}.gate.weight"] = (4, HIDDEN)
        for expert in range(4):
            name = part.replace(".0.", f".{expert}.")
            shapes[f"model.layers.{layer}.{name}.weight"] = (INTERMEDIATE, HIDDEN)
    config = {
        "model_type": "mixtral",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    facts = read_model(write_model(tmp_path / "tried", shapes, **config))
    expert, attention = INTERMEDIATE * HIDDEN, HIDDEN * HIDDEN
    assert facts.ffn_elements == (4 * expert,) * LAYERS
    assert facts.others[0].elements == attention + 4 * HIDDEN
    assert facts.active_ffn_elements(0) == 2 * expert
    assert facts.touched_ffn_elements(0, 1) == 2 * expert
    assert facts.touched_ffn_elements(0, 2) == 3 * expert
    check_runnable(facts, tmp_path / "tried", "streamed")


def test_mixture_without_a_number_of_experts(tmp_path: Path) -> None:
    shapes = {
        f"model.layers.{layer}.mlp.experts.0.up_proj.weight": (4, 8) for layer in range(LAYERS)
    }
    with pytest.raises(InputError, match="no number of experts"):
        read_model(write_model(tmp_path, shapes))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_config_alone_gives_the_shapes_that_are_written(tmp_path: Path, model_type: str) -> None:
    """The files are made by Hugging Face's own classes."""
    make_model(tmp_path, model_type, 2, 64, 96, 4, 2, 512)
    with_files = read_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    alone = read_model(tmp_path)
    assert alone == replace(with_files, has_weights=False)
    with pytest.raises(InputError, match="has no weights"):
        check_runnable(alone, tmp_path, "none")


def _write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
