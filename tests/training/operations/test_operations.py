"""Operations by name: three spellings of each say the same, and what they say gives its value."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from elbowroom.core.errors import InputError
from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.training.layers import trace_model
from elbowroom.training.operations.find import operations_of, shapes_of
from elbowroom.training.operations.operation import Constant, Norm, Pointwise, Source, Stored
from tests.pipeline.models import Residual, looks, tiny_lm
from tests.training.operations.replay import Calls, Exported, check

pytestmark = pytest.mark.usefixtures("one_thread")


def rand(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class Case(NamedTuple):
    """A kind and settings, a module, the same as a function of the input, and the input's shape."""

    kind: str
    module: nn.Module | None
    function: Any
    shape: tuple[int, ...]
    state: tuple[str, ...] = ()
    kept: Any = ()


def conv(n: int, image: tuple[int, ...], name: str = "Conv", **more: Any) -> Case:
    module = getattr(nn, f"{name}{n}d")(4, 6, **more).double()
    function = getattr(F, f"conv{'_transpose' if 'T' in name else ''}{n}d")
    kwargs = {k: v for k, v in more.items() if k not in ("kernel_size", "bias", "padding_mode")}
    plain = None
    if "padding_mode" not in more:
        plain = lambda m, x: function(x, m.weight, getattr(m, "bias", None), **kwargs)  # noqa: E731
    kind = "conv_transpose" if "T" in name else "conv"
    return Case(kind, module, plain, (2, 4, *image), ("weight", "bias"))


def pool(name: str, n: int, image: tuple[int, ...], **more: Any) -> Case:
    module = getattr(nn, f"{name.title().replace('_', '')}{n}d")(**more)
    function = getattr(F, f"{name}{n}d")
    return Case(name, module, lambda m, x: function(x, **more), (2, 3, *image))


def resize(image: tuple[int, ...], **more: Any) -> Case:
    return Case(
        "resize", nn.Upsample(**more), lambda m, x: F.interpolate(x, **more), (2, 3, *image)
    )


def pointwise(module: nn.Module | None, function: Any) -> Case:
    return Case("pointwise", module, lambda m, x: function(x), (3, 4, 5))


CASES = {
    "conv 1d": conv(1, (9,), kernel_size=3, stride=2, padding=1),
    "conv 2d": conv(2, (9, 8), kernel_size=(3, 5), stride=(1, 2), padding=(2, 0), groups=2),
    "conv 2d dilated": conv(2, (9, 9), kernel_size=3, dilation=2, padding=2, bias=False),
    "conv 2d valid": conv(2, (9, 9), kernel_size=3, padding="valid"),
    "conv 2d same": conv(2, (7, 9), kernel_size=(4, 3), padding="same", dilation=(1, 2)),
    "conv 3d": conv(3, (5, 6, 7), kernel_size=3, padding=1, stride=2),
    "conv circular": conv(2, (6, 7), kernel_size=3, padding=2, padding_mode="circular"),
    "conv reflect": conv(1, (6,), kernel_size=4, padding="same", padding_mode="reflect"),
    "conv replicate": conv(2, (6, 7), kernel_size=3, padding=(1, 3), padding_mode="replicate"),
    "transposed 1d": conv(1, (5,), "ConvTranspose", kernel_size=4, stride=3, padding=1),
    "transposed 2d": conv(
        *(2, (4, 5), "ConvTranspose"),
        kernel_size=3, stride=2, padding=1, output_padding=1, groups=2,
    ),
    "transposed 3d": conv(3, (3, 3, 4), "ConvTranspose", kernel_size=2, stride=2, dilation=2),
    "max pool 1d": pool("max_pool", 1, (9,), kernel_size=3, stride=2, padding=1),
    "max pool 2d": pool("max_pool", 2, (9, 8), kernel_size=3, stride=2, ceil_mode=True),
    "max pool dilated": pool("max_pool", 2, (9, 9), kernel_size=2, dilation=3, stride=1),
    "max pool 3d": pool("max_pool", 3, (6, 6, 7), kernel_size=(2, 3, 2)),
    "avg pool 1d": pool("avg_pool", 1, (9,), kernel_size=4, stride=2, padding=2),
    "avg pool ceil": pool("avg_pool", 2, (9, 8), kernel_size=4, stride=3, padding=2,
                          ceil_mode=True),
    "avg pool not padded": pool(
        *("avg_pool", 2, (9, 8)),
        kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False,
    ),
    "avg pool divided": pool("avg_pool", 2, (9, 8), kernel_size=3, divisor_override=5),
    "avg pool 3d": pool("avg_pool", 3, (6, 5, 7), kernel_size=2, padding=1),
    "adaptive": Case(
        *("avg_pool", nn.AdaptiveAvgPool2d((3, None))),
        *(lambda m, x: F.adaptive_avg_pool2d(x, (3, 4)), (2, 3, 6, 4)),
    ),
    "adaptive to one": Case(
        *("global_pool", nn.AdaptiveAvgPool2d(1)),
        *(lambda m, x: F.adaptive_avg_pool2d(x, 1), (2, 3, 6, 4)),
    ),
    "mean of space": Case("global_pool", None, lambda m, x: x.mean((2, -1)), (2, 3, 6, 4)),
    "mean kept": Case(
        "global_pool", None, lambda m, x: torch.mean(x, (2, 3), keepdim=True), (2, 3, 6, 4)
    ),
    "nearest": resize((5, 4), scale_factor=2),
    "nearest 1d": resize((5,), size=7),
    "nearest 3d": resize((3, 2, 4), scale_factor=(2.0, 1.0, 1.5)),
    "nearest exact": resize((5, 4), scale_factor=1.6, mode="nearest-exact"),
    "nearest again": resize((5, 7), scale_factor=1.5, recompute_scale_factor=True),
    "linear": resize((5,), scale_factor=1.7, mode="linear"),
    "bilinear": resize((5, 4), size=(8, 3), mode="bilinear"),
    "bilinear aligned": resize((5, 4), scale_factor=2, mode="bilinear", align_corners=True),
    "trilinear": resize((3, 4, 2), scale_factor=1.3, mode="trilinear"),
    "batch norm": Case(
        *("batch_norm", nn.BatchNorm2d(3).double()),
        *(lambda m, x: F.batch_norm(x, None, None, m.weight, m.bias, True), (4, 3, 5, 2)),
        ("weight", "bias"),
    ),
    "batch norm of features": Case(
        *("batch_norm", nn.BatchNorm1d(3, affine=False).double()),
        *(lambda m, x: F.batch_norm(x, None, None, training=True), (4, 3)),
    ),
    "frozen batch norm": Case("batch_norm", nn.BatchNorm2d(3).double().eval(), None, (4, 3, 5, 2)),
    "group norm": Case(
        *("group_norm", nn.GroupNorm(2, 4, eps=1e-3).double()),
        *(lambda m, x: F.group_norm(x, 2, m.weight, m.bias, 1e-3), (2, 4, 5)),
        ("weight", "bias"),
    ),
    "instance norm": Case(
        *("group_norm", nn.InstanceNorm2d(4).double()),
        *(lambda m, x: F.instance_norm(x), (2, 4, 5, 3)),
    ),
    "layer norm": Case(
        *("layer_norm", nn.LayerNorm(5).double()),
        *(lambda m, x: F.layer_norm(x, (5,), m.weight, m.bias), (2, 4, 5)),
        ("weight", "bias"),
    ),
    "linear layer": Case(
        *("linear", nn.Linear(5, 7).double()),
        *(lambda m, x: F.linear(x, m.weight, m.bias), (2, 4, 5)),
        ("weight", "bias"),
    ),
    "relu": pointwise(nn.ReLU(), torch.relu),
    "relu in place": pointwise(nn.ReLU(inplace=True), lambda x: F.relu(x * 1, True)),
    "gelu": pointwise(nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": pointwise(nn.SiLU(), F.silu),
    "leaky": pointwise(nn.LeakyReLU(0.3), lambda x: F.leaky_relu(x, 0.3)),
    "elu": pointwise(nn.ELU(0.3), lambda x: F.elu(x, 0.3)),
    "hardswish": pointwise(nn.Hardswish(), F.hardswish),
    "hardtanh": pointwise(nn.Hardtanh(-0.2, 0.5), lambda x: F.hardtanh(x, -0.2, 0.5)),
    "relu6": pointwise(nn.ReLU6(), F.relu6),
    "softplus": pointwise(nn.Softplus(2.0), lambda x: F.softplus(x, 2.0)),
    "sigmoid": pointwise(nn.Sigmoid(), torch.sigmoid),
    "tanh": pointwise(nn.Tanh(), lambda x: x.tanh()),
    "mish": pointwise(nn.Mish(), F.mish),
    "identity": pointwise(nn.Identity(), lambda x: x.contiguous()),
    "exp": pointwise(None, lambda x: x.exp()),
    "clamp": pointwise(None, lambda x: x.clamp(min=0.1)),
    "a number": pointwise(None, lambda x: 2 - x),
    "a power": pointwise(None, lambda x: x**2),
    "itself": pointwise(None, lambda x: x * x),
    "cast": pointwise(None, lambda x: x.float()),
    "cast to": pointwise(None, lambda x: x.to(torch.float32)),
    "dropout in eval": pointwise(nn.Dropout().eval(), lambda x: F.dropout(x, 0.5, False)),
    "flatten": Case("reshape", nn.Flatten(), lambda m, x: x.flatten(1), (2, 3, 4)),
    "view": Case("reshape", None, lambda m, x: x.view(x.size(0), -1, 2), (2, 3, 4)),
    "squeeze": Case("reshape", None, lambda m, x: x.unsqueeze(1).squeeze(1), (2, 3, 4)),
    "unflatten": Case(
        "reshape", nn.Unflatten(1, (3, 2)), lambda m, x: x.unflatten(1, (3, 2)), (4, 6)
    ),
    "permute": Case("permute", None, lambda m, x: x.permute(0, 3, 1, 2), (2, 3, 4, 5)),
    "permute a tuple": Case(
        "permute", None, lambda m, x: torch.permute(x, (0, 2, -1, 1)), (2, 3, 4, 5)
    ),
    "transpose": Case("permute", None, lambda m, x: x.transpose(-1, 1), (2, 3, 4, 5)),
    "cat": Case("cat", None, lambda m, x: torch.cat([x, x], dim=-1), (2, 3, 4)),
    "scaled by a weight": Case(
        "elementwise", None, lambda m, x: x * m.weight + m.bias, (2, 3, 4), ("weight", "bias"),
        {"weight": rand(4), "bias": rand(3, 1)},
    ),
    "dots": Case(
        *("dot_attention", None),
        *(lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),),
        (2, 3, 4, 5),
    ),
}  # fmt: skip


APART = ("conv circular", "conv reflect", "conv replicate", "identity")
"""What export writes as several operations, or leaves out."""


def spellings() -> list[tuple[str, str]]:
    found = []
    for name, case in CASES.items():
        ways = ["module"] * (case.module is not None) + ["function"] * (case.function is not None)
        found += [(name, way) for way in ways]
        found += [(name, f"exported {way}") for way in ways[:1] if name not in APART]
    return found


@pytest.mark.parametrize(("name", "spelling"), spellings())
def test_what_rules_say_gives_the_value(name: str, spelling: str) -> None:
    case = CASES[name]
    if spelling.endswith("module"):
        assert case.module is not None
        model = case.module
    else:
        state = dict(case.kept)
        if case.module is not None:
            state = {key: p.detach() for key, p in case.module.named_parameters()}
        model = Calls(case.function, **state)
    is_exported = spelling.startswith("exported")
    kinds = check(Exported(model) if is_exported else nn.Sequential(model), rand(*case.shape))
    assert kinds
    assert {*kinds} - {"pointwise"} == {case.kind} - {"pointwise"}


@pytest.mark.parametrize("exported", [False, True])
def test_embeddings(exported: bool) -> None:
    ids = torch.randint(0, 9, (2, 5))
    module: nn.Module = nn.Embedding(9, 4, padding_idx=-2).double()
    plain = Calls(lambda m, x: F.embedding(x, m.weight, -2), weight=rand(9, 4))
    for model in (module, plain):
        model = Exported(model) if exported else nn.Sequential(model)
        assert check(model, ids) == ["embedding"]
        settings = operations_of(trace_model(model, ids, leaves=True))[-1].settings
        assert settings is not None
        assert settings.padding_idx == 7  # type: ignore[union-attr]


class Attends(nn.Module):
    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **more).double()
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -torch.inf), 1).double())
        self.norm = nn.LayerNorm(6).double()

    def attend(self, y: torch.Tensor) -> Any:
        return self.attention(y, y, y, need_weights=False)[0]

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.attend(self.norm(x))


class Masked(Attends):
    def attend(self, y: torch.Tensor) -> Any:
        return self.attention(y, y, y, attn_mask=self.mask, need_weights=False)[0]


class Causal(Attends):
    def attend(self, y: torch.Tensor) -> Any:
        return self.attention(y, y, y, attn_mask=self.mask, need_weights=False, is_causal=True)[0]


class Weighted(Attends):
    def attend(self, y: torch.Tensor) -> Any:
        out, weights = self.attention(y, y, y)
        return out + weights.sum()


class Crossed(Attends):
    def attend(self, y: torch.Tensor) -> Any:
        return self.attention(y, y + 1, y, need_weights=False)[0]


@pytest.mark.parametrize("kind", [Attends, Masked, Causal])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_to_itself(kind: type[Attends], bias: bool) -> None:
    kinds = check(kind(bias=bias), rand(2, 4, 6))
    assert kinds == ["layer_norm", "attention", "pointwise", "elementwise"]


@pytest.mark.parametrize(
    "model", [Weighted(), Crossed(), Attends(dropout=0.1), Attends(add_bias_kv=True)]
)
def test_other_attention_has_no_rule(model: nn.Module) -> None:
    assert "attention" not in check(model, rand(2, 4, 6))


def hooked() -> nn.Module:
    module = nn.Linear(6, 6).double()
    module.register_forward_hook(lambda m, args, out: out * 2)
    return module


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.cat(x.chunk(2, dim=1)[::-1], dim=1)


WHOLE: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "softmax": (nn.Softmax(-1), (4, 6)),
    "hooks": (hooked(), (4, 6)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(6, 6).double()), (4, 6)),
    "sum": (Calls(lambda m, x: x.cumsum(1)), (4, 6)),
    "flat batch": (Calls(lambda m, x: x.view(-1, 3)), (4, 6)),
    "batch moved": (Calls(lambda m, x: x.transpose(0, 1)), (4, 6)),
    "batch joined": (Calls(lambda m, x: torch.cat([x, x])), (4, 6)),
    "sizes": (Calls(lambda m, x: x * x.size(1)), (4, 6)),
    "bits": (Calls(lambda m, x: x.view(torch.int64)), (4, 6)),
    "no batch": (nn.Conv1d(4, 2, 3).double(), (4, 6)),
    "one dim of space": (Calls(lambda m, x: x.mean(-1)), (4, 3, 5, 6)),
    "mean of all": (Calls(lambda m, x: x.mean()), (4, 6)),
    "uneven": (nn.AdaptiveAvgPool2d(4), (4, 3, 6, 6)),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), (4, 3, 5, 6)),
    "of a computed weight": (
        Calls(lambda m, x: F.linear(x, m.weight * 2), weight=rand(6, 6)), (4, 6),
    ),
    "outer": (Calls(lambda m, x: x[:, :1] + m.weight, weight=rand(1, 6)), (4, 6)),
    "of the batch": (Calls(lambda m, x: x + m.weight, weight=rand(4, 6)), (4, 6)),
    "dropout of channels": (nn.Dropout2d(), (4, 3, 5, 6)),
    "running instance norm": (
        nn.InstanceNorm1d(3, track_running_stats=True).double(), (4, 3, 5),
    ),
    "masked": (
        Calls(lambda m, x: F.scaled_dot_product_attention(x, x, x, m.weight), weight=rand(4, 4)),
        (2, 3, 4, 5),
    ),
    "space joined": (Calls(lambda m, x: torch.cat([x, x], 2)), (4, 3, 5, 6)),
    "norm of two": (nn.LayerNorm((5, 6)).double(), (4, 3, 5, 6)),
    "norm of a row": (
        nn.Sequential(nn.Conv1d(3, 2, 1).double(), nn.LayerNorm(6).double()), (4, 3, 6),
    ),
    "padding apart": (Calls(lambda m, x: F.pad(x, (1, 1))), (4, 6)),
    "a pair": (Pair(), (4, 6)),
}  # fmt: skip


WRITTEN_DOWN = ("weight norm", "hooks", "sizes", "a pair")
"""What export knows, as it writes down what it comes to."""


@pytest.mark.parametrize(
    ("name", "exported"),
    [(name, False) for name in WHOLE] + [(n, True) for n in WHOLE if n not in WRITTEN_DOWN],
)
def test_what_no_rule_describes_is_whole(name: str, exported: bool) -> None:
    model, shape = WHOLE[name]
    kinds = check(Exported(model) if exported else nn.Sequential(model), rand(*shape))
    assert "whole" in kinds
    assert not {*kinds} & {"linear", "dot_attention", "reshape", "permute", "dropout", "cat"}
    assert not {*kinds} & {"layer_norm", "global_pool", "group_norm"}


def test_sparse_embeddings_are_whole() -> None:
    for more in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        model = nn.Sequential(nn.Embedding(9, 4, **more).double())
        assert check(model, torch.randint(0, 9, (2, 5))) == ["whole"]


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "exported"])
def test_a_norm_names_what_it_counts(exported: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    given: nn.Module = Exported(model.double()) if exported else model.double()
    traced = trace_model(given, rand(2, 3, 5, 5), leaves=True)
    norm = operations_of(traced)[2]
    assert isinstance(norm.settings, Norm)
    assert norm.settings.momentum == 0.1
    prefix = "inner." if exported else ""
    roles = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert norm.parameters == {role: f"{prefix}1.{role}" for role in roles}
    assert (norm.shape.weights, norm.shape.biases) == (0, 8)


def test_a_residual_block_out_of_place() -> None:
    kinds = check(Residual(4).double(), rand(2, 4, 5, 5))
    assert kinds == [
        *("conv", "batch_norm", "pointwise", "conv", "batch_norm", "elementwise", "pointwise")
    ]


def test_arguments_in_order() -> None:
    model = Calls(lambda m, x: 1 - (x + m.weight) * x, weight=rand(6))
    operations = operations_of(trace_model(model, rand(2, 6), leaves=True))
    settings = [each.settings for each in operations if isinstance(each.settings, Pointwise)]
    assert [each.arguments for each in settings] == [
        (Source(0), Stored("weight")),
        (Source(0), Source(1)),
        (Constant(1), Source(0)),
    ]
    assert [each.shape.sources for each in operations[1:]] == [("x",), ("add", "x"), ("mul",)]


class Stale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = y.view(-1, 3)
        z.add_(1)
        return y + z.view(-1, 6)


class Fresh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = y + 1
        return torch.cat([z, y.relu_()], dim=1)


def test_what_is_read_after_another_wrote_into_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"'add_'.*'add'"):
        operations_of(trace_model(Stale(), rand(2, 6), leaves=True))
    assert check(Fresh(), rand(2, 6)) == ["pointwise", "pointwise", "pointwise", "cat"]


class Averages(nn.Module):
    """Keeps a mean of its inputs, whose width is that of the batch, in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("sum", torch.zeros(1, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x - self.mean.clone()
        if self.way == "copy_":
            self.mean.copy_(self.mean * 0.9 + x.detach().mean(0) * 0.1)
        elif self.way == "add_":
            self.sum.add_(x.clone())
        else:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return y


def test_what_is_written_into_a_buffer_is_so_on_every_worker() -> None:
    for way in ("copy_", "add_"):
        rows = 1 if way == "add_" else 4
        operations = operations_of(trace_model(Averages(way), rand(rows, 4), leaves=True))
        kinds = {each.shape.name: each.shape.kind for each in operations}
        assert kinds[way] == "whole"
        assert kinds["sub"] == "elementwise"
    with pytest.raises(InputError, match="'mean' through 'mul_'"):
        operations_of(trace_model(Averages("chain"), rand(4, 4), leaves=True))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(8, 8).double(), nn.Linear(8, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.queries(x).view(2, 3, 4, 2).transpose(1, 2)
        k = self.keys(x).view(2, 3, 2, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def test_heads_that_share_keys() -> None:
    assert check(Grouped(), rand(2, 3, 8))[-1] == "dot_attention"


def test_a_model_of_many_layers() -> None:
    model, ids = tiny_lm()
    kinds = check(model.double(), ids)
    assert kinds.count("linear") == 9
    assert kinds.count("dot_attention") == kinds.count("dropout") // 2 == 2
    assert kinds.count("layer_norm") == 5
    model, x = looks()
    assert check(model.double(), x.double()).count("linear") == 2


def test_features_follow_the_tensor() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 2, stride=2)
            self.qkv = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.qkv(self.patches(x).flatten(2).transpose(1, 2))
            z = y.view(2, 4, 2, 4).transpose(1, 2)
            z = F.scaled_dot_product_attention(z, z, z)
            return z.transpose(1, 2).reshape(2, 4, 8).mean(1)

    shapes = shapes_of(trace_model(Tokens().double(), rand(2, 3, 4, 4), leaves=True))
    found = [(layer.kind, layer.features) for layer in shapes.layers]
    assert found == [
        *(("input", 1), ("conv", 1), ("reshape", 1), ("permute", 2), ("linear", 2)),
        *(("reshape", 2), ("permute", 1), ("dot_attention", 1), ("permute", 2)),
        *(("reshape", 2), ("whole", 1)),
    ]


def test_facts_for_a_planner() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    )
    shapes = shapes_of(trace_model(model, torch.randn(3, 4, 4, 4), leaves=True))
    assert ModelShapes.from_json(shapes.to_json()) == shapes
    assert (shapes.batch, shapes.element_bytes, shapes.results) == (3, 4, ("3",))
    by_name = shapes.by_name
    assert (by_name["0"].weights, by_name["0"].biases, by_name["0"].groups) == (108, 6, 2)
    assert by_name["0"].flops == 2 * 3 * 16 * 6 * 2 * 9
    assert by_name["3"].flops == 2 * 3 * 24 * 5
    assert [layer.name for layer in shapes.weighted] == ["0", "3"]
    assert shapes.num_weights == sum(p.numel() for p in model.parameters())


def test_children_of_a_sequential_are_traced_when_asked() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 2))
    traced = trace_model(model, torch.randn(2, 6), leaves=True)
    assert [layer.name for layer in traced.layers] == ["input", "0.0", "0.1", "1"]
    assert [layer.name for layer in trace_model(model, torch.randn(2, 6)).layers] == [
        *("input", "0", "1")
    ]


def test_a_model_whose_input_has_no_batch() -> None:
    model = Calls(lambda m, x: x * 2)
    with pytest.raises(InputError, match="batch"):
        operations_of(trace_model(model, torch.tensor(2.0), leaves=True))
