"""Scripts as people have them, trained in two stages: as the plain loop, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elbowroom.training.checkpoint import newest_checkpoint
from elbowroom.training.outcome import in_training
from elbowroom.training.script import load_script
from elbowroom.training.tracing import called
from tests.pipeline.members import Members
from tests.pipeline.script_member import ScriptCase

SCRIPTS = Path(__file__).parents[1] / "data" / "training"


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    members = Members("tests.pipeline.script_member")
    yield members
    members.end()


Weights = dict[str, torch.Tensor]


def trained(members: Members, folder: Path, case: ScriptCase) -> tuple[list[str], Weights]:
    """What each worker was refused for, and the weights of all stages by name."""
    folder.mkdir()
    seen = members.run(case, folder)
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return [worker["error"] for worker in seen], weights


def plain(path: Path, num_steps: int) -> Weights:
    """Weights after a plain loop, tied ones by each of their names."""
    script = load_script(path)
    model = in_training(script.make_model(0))
    optimizer = script.optimizer_fn(None)([p for p in model.parameters() if p.requires_grad])
    scheduler = script.make_scheduler(optimizer, num_steps) if script.has_scheduler else None
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        inputs, targets = script.make_batch(generator)
        script.loss_fn(called(model, inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in named}


def check_same(found: Weights, path: Path, num_steps: int) -> None:
    """They differ from those of a plain loop by less than 2 % of what they moved: roundings."""
    expected, begin = plain(path, num_steps), plain(path, 0)
    distinct = {weight.data_ptr() for weight in expected.values()}
    assert {expected[name].data_ptr() for name in found} == distinct
    moved = sum(float((expected[name] - begin[name]).abs().square().sum()) for name in found)
    off = sum(float((expected[name] - found[name]).abs().square().sum()) for name in found)
    assert moved > 0
    assert off < 4e-4 * moved


@pytest.mark.parametrize(
    ("name", "microbatches"),
    [
        ("c07_t5", 1),
        ("c07b_t5_dec", 1),
        ("c16_frozen", 1),
        ("c17_frozen_bn_eval", 1),
        ("c19_custom_fn", 1),
        ("c20_inplace", 1),
        ("c27_moe", 1),
        ("c22_sparse", 1),
        ("c26_fno", 1),
        ("c56_maxnorm", 1),
        ("c58_vq", 1),
        ("c83_ema_late", 1),
        ("c97_annealed", 1),
        ("c100_checkpointed_blocks", 1),
        ("c107_caches", 1),
        ("c32_multiloss_mb", 4),
        ("c86_mask_tt", 4),
        ("c87_pos_ids", 4),
    ],
)
def test_as_the_plain_loop(members: Members, tmp_path: Path, name: str, microbatches: int) -> None:
    path = SCRIPTS / f"{name}.py"
    case = ScriptCase(str(path), microbatches=microbatches)
    errors, weights = trained(members, tmp_path / "run", case)
    assert errors == ["", ""]
    check_same(weights, path, case.num_steps)


@pytest.mark.parametrize(
    ("name", "words", "more"),
    [
        ("c10_lstm_stateful", "earlier calls", {}),
        ("c14_layerdrop", "Python's random", {}),
        ("c13_dyn_data", "c13_dyn_data.py", {}),
        ("c24_packed", "c24_packed.py", {}),
        ("c15_counter", "'step'", {}),
        ("c31_npaug", "make_batch gives each worker another minibatch", {}),
        ("c105_batches_count", "making minibatches changes 'STEP (global)", {}),
        ("c106_losses_count", "loss_fn changes 'STEP (global)", {}),
        ("c41_plateau", "ReduceLROnPlateau", {}),
        ("c42_lbfgs", "LBFGS", {}),
        ("c48_maskinput", "rows of a part of a minibatch", {"microbatches": 4}),
        ("c56_maxnorm", "--semantics flush", {"semantics": "stash"}),
        ("c100_checkpointed_blocks", "--semantics flush", {"semantics": "stash"}),
        ("c101_gradient_hook", "'0.weight' has a hook", {}),
        ("c94_changing_number", "what changes must be a tensor", {}),
        ("c95_regularised", "loss_fn reads the parameter", {}),
        ("c95_regularised", "loss_fn reads the parameter", {"microbatches": 4}),
        ("c96_aux_on_module", "let the model return what the loss needs", {}),
        ("c98_late_random", "make_batch gives each worker another minibatch", {}),
        ("c99_autocast_branch", "something else than the model", {"autocast": True}),
    ],
)
def test_what_is_refused_by_name(
    members: Members, tmp_path: Path, name: str, words: str, more: dict[str, object]
) -> None:
    case = ScriptCase(str(SCRIPTS / f"{name}.py"), num_stages=1, **more)  # type: ignore[arg-type]
    if "each worker" in words:
        case = ScriptCase(str(SCRIPTS / f"{name}.py"))
    errors, weights = trained(members, tmp_path / "run", case)
    assert all(words in error for error in errors), errors
    assert not weights


def test_recomputation_that_is_traced_through_is_told(members: Members, tmp_path: Path) -> None:
    case = ScriptCase(str(SCRIPTS / "c25_checkpointing.py"), num_stages=1, num_steps=1)
    assert "torch.utils.checkpoint" in members.run(case, tmp_path)[0]["notes"][0]


def test_a_mean_of_means_is_told(members: Members, tmp_path: Path) -> None:
    """Tokens that are left out make rows count unlike: the loss of microbatches is another."""
    case = ScriptCase(str(SCRIPTS / "c47_ignore.py"), num_stages=1, num_steps=1, microbatches=4)
    seen = members.run(case, tmp_path)
    assert "ignore_index" in seen[0]["notes"][0]
    even = ScriptCase(str(SCRIPTS / "c32_multiloss_mb.py"), 1, num_steps=1, microbatches=4)
    (tmp_path / "even").mkdir()
    assert members.run(even, tmp_path / "even")[0]["notes"] == []


@pytest.mark.parametrize(
    "name", ["c37_checkpoint_lrs", "c38_multistep", "c73_lrtensor", "c74_groups_resume"]
)
@pytest.mark.parametrize("num_stages", [2, 1])
def test_a_resume_is_as_no_stop(
    members: Members, tmp_path: Path, name: str, num_stages: int
) -> None:
    """Also on another number of stages, whose parameter groups are others."""
    path = str(SCRIPTS / f"{name}.py")
    kept = str(tmp_path / "kept")
    first = ScriptCase(path, num_steps=9, saves=True, checkpoints=kept)
    assert trained(members, tmp_path / "one", first)[0] == ["", ""]
    rest = ScriptCase(path, num_stages, num_steps=18, checkpoints=kept, first=9)
    errors, weights = trained(members, tmp_path / "two", rest)
    assert set(errors) == {""}
    check_same(weights, Path(path), 18)


@pytest.mark.parametrize("num_stages", [2, 1])
def test_a_resume_with_another_rate_is_refused(
    members: Members, tmp_path: Path, num_stages: int
) -> None:
    path, kept = str(SCRIPTS / "c98_late_random.py"), str(tmp_path / "kept")
    first = ScriptCase(path, 2, num_steps=2, saves=True, checkpoints=kept, lr=0.25)
    assert trained(members, tmp_path / "one", first)[0] == ["", ""]
    rest = ScriptCase(path, num_stages, num_steps=2, checkpoints=kept, first=2, lr=0.5)
    errors, _ = trained(members, tmp_path / "two", rest)
    assert all("with lr 0.25, and this one has 0.5" in error for error in errors), errors


def trained_by_two(members: Members, folder: Path, path: Path) -> Weights:
    """Weights after 6 minibatches on two replicas, half of each on one; as the plain loop's."""
    case = ScriptCase(str(path), num_stages=1, num_replicas=2, num_steps=6, microbatches=2)
    errors, weights = trained(members, folder, case)
    assert errors == ["", ""]
    check_same(weights, path, case.num_steps)
    return weights


def test_replicas_add_sparse_gradients(members: Members, tmp_path: Path) -> None:
    trained_by_two(members, tmp_path / "run", SCRIPTS / "c22_sparse.py")


def test_replicas_leave_parameters_without_a_gradient_alone(
    members: Members, tmp_path: Path
) -> None:
    path = SCRIPTS / "c68_unused.py"
    weights, begin = trained_by_two(members, tmp_path / "run", path), plain(path, 0)
    assert torch.equal(weights["two.1.weight"], begin["two.1.weight"])
    assert not torch.equal(weights["two.0.weight"], begin["two.0.weight"])


def test_replicas_that_were_made_differently_are_made_equal(
    members: Members, tmp_path: Path
) -> None:
    case = ScriptCase(str(SCRIPTS / "c84_replicas_differ.py"), num_stages=1, num_replicas=2)
    errors, _ = trained(members, tmp_path / "run", case)
    assert errors == ["", ""]
    one, other = (load_file(tmp_path / "run" / f"{number}.safetensors") for number in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_of_tied_layers_go_back_into_the_model(members: Members, tmp_path: Path) -> None:
    path = SCRIPTS / "c03_gpt2_tied.py"
    case = ScriptCase(
        str(path), num_stages=1, num_steps=2, saves=True, checkpoints=str(tmp_path / "kept")
    )
    assert trained(members, tmp_path / "run", case)[0] == [""]
    checkpoint = newest_checkpoint(tmp_path / "kept")
    assert checkpoint is not None
    model = load_script(path).make_model(1)
    checkpoint.load_weights(model)
    check_same({name: p.detach() for name, p in model.named_parameters()}, path, 2)
