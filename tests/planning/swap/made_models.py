"""Step profiles of made-up models: their logs follow from layers, as a measured step's would."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from elbowroom.core.recipe import Call, Made, Recipe, TensorArgument
from elbowroom.core.step_profile import SavedStorage, StepProfile, can_read
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.timeline import SwapLink

MIB = 1024**2


class Saved(NamedTuple):
    """What a layer saves beside its input: bytes that only its own backward needs."""

    num_bytes: int


class MadeLayer(NamedTuple):
    """A layer: sizes in bytes, seconds of both passes.

    ``skip`` is the number of an earlier layer whose output it takes as well, and saves.
    """

    output_bytes: int
    seconds: float
    backward_seconds: float
    workspace_bytes: int = 0
    saved: tuple[Saved, ...] = ()
    skip: int | None = None


@dataclass
class _Storage:
    num_bytes: int
    made_by: str
    pack_ticks: list[int] = field(default_factory=list)
    unpack_ticks: list[int] = field(default_factory=list)
    free: int | None = None
    bring: int | None = None
    release: int | None = None

    def numbered(self, number: int) -> SavedStorage:
        ticks = tuple(self.pack_ticks), tuple(self.unpack_ticks)
        return SavedStorage(
            number, self.num_bytes, self.made_by, *ticks, self.free, self.bring, self.release
        )


class _Step:
    """A step with everything swapped at once, written down as it happens.

    Outputs that layers save are named x0, x1 ..., what a layer saves beside them s2.0, s2.1 ...
    """

    def __init__(self, layers: list[MadeLayer]) -> None:
        self.deltas: list[int] = []
        self.positions: list[int] = []
        self.seconds: list[float] = [0.0]
        """Seconds before the first tick, then after each."""
        self.saved: dict[str, _Storage] = {}
        self._layers = layers
        self._readers = [
            [m for m, layer in enumerate(layers) if n in _sources(m, layer)]
            for n in range(len(layers))
        ]

    def forward(self, number: int) -> None:
        layer = self._layers[number]
        self._hold(layer.output_bytes)
        self._compute(layer.seconds, layer.workspace_bytes)
        sources = _sources(number, layer)
        for source in sources:
            output = _Storage(self._layers[source].output_bytes, f"layer{source}")
            self.saved.setdefault(f"x{source}", output).pack_ticks.append(self._tick())
        for index, own in enumerate(layer.saved):
            self._hold(own.num_bytes)
            storage = self.saved[f"s{number}.{index}"] = _Storage(own.num_bytes, f"layer{number}")
            storage.pack_ticks.append(self._tick())
            storage.free = self._hold(-own.num_bytes)
        for source in sources:
            if number == max(self._readers[source]):
                self.saved[f"x{source}"].free = self._hold(-self._layers[source].output_bytes)

    def backward(self, number: int) -> None:
        layer, sources = self._layers[number], _sources(number, self._layers[number])
        names = [f"s{number}.{index}" for index in range(len(layer.saved))]
        names += [f"x{source}" for source in sources]
        for name in names:
            storage = self.saved[name]
            storage.unpack_ticks.append(self._tick())
            if storage.bring is None:
                storage.bring = self._hold(storage.num_bytes)
        self._compute(layer.backward_seconds, layer.workspace_bytes)
        self._hold(-layer.output_bytes)
        for name in names:
            if name.startswith("s") or number == min(self._readers[int(name[1:])]):
                self.saved[name].release = self._hold(-self.saved[name].num_bytes)
        for source in sources:  # gradients: each begins with the last reader's, the first here
            if number == max(self._readers[source]):
                self._hold(self._layers[source].output_bytes)

    def _hold(self, num_bytes: int) -> int:
        self.deltas.append(num_bytes)
        return len(self.deltas) - 1

    def _tick(self) -> int:
        self.positions.append(self._hold(0))
        self.seconds.append(0.0)
        return len(self.positions) - 1

    def _compute(self, seconds: float, workspace_bytes: int) -> None:
        self._hold(workspace_bytes)
        self._hold(-workspace_bytes)
        self.seconds[-1] += seconds


def made_profile(layers: list[MadeLayer], static_bytes: int = 3 * MIB) -> StepProfile:
    """The profile of a chain of layers with skips."""
    step = _Step(layers)
    for number in range(len(layers)):
        step.forward(number)
    num_forward_ticks = len(step.positions)
    for number in reversed(range(len(layers))):
        step.backward(number)
    storages = sorted(step.saved.values(), key=lambda storage: storage.pack_ticks[0])
    return StepProfile(
        seconds_before=step.seconds[0],
        seconds=tuple(step.seconds[1:]),
        num_forward_ticks=num_forward_ticks,
        tick_positions=tuple(step.positions),
        deltas=tuple(step.deltas),
        static_bytes=static_bytes,
        smallest_bytes=1024,
        storages=tuple(storage.numbered(number) for number, storage in enumerate(storages)),
    )


def _sources(number: int, layer: MadeLayer) -> list[int]:
    """Layers whose outputs a layer takes and saves."""
    sources = [number - 1] if number else []
    return sources if layer.skip is None else [*sources, layer.skip]


def cnn_like(size: int = MIB) -> StepProfile:
    """18 storages: halved in size by each of three groups, later layers faster."""
    layers = []
    for group in range(3):
        for block in range(3):
            out = size * 8 // 2**group
            seconds = 0.004 * (1 + 0.3 * (block == 0)) / (1 + 0.2 * group)
            layers.append(MadeLayer(out, seconds, 2 * seconds, out // 4))
            layers.append(MadeLayer(out, seconds / 3, seconds / 2))
    layers.append(MadeLayer(size // 64, 0.0005, 0.001))
    return made_profile(layers)


def unet_like(size: int = MIB) -> StepProfile:
    """20 storages: sizes fall and rise again, and the first outputs are needed at the end too."""
    depths = (0, 1, 2, 3)
    layers: list[MadeLayer] = []
    ends = []
    for depth in depths:
        out = size * 16 // 4**depth
        for _ in range(3 if depth < 3 else 2):
            layers.append(MadeLayer(out, 0.02 / 2**depth, 0.04 / 2**depth, out // 2))
        ends.append(len(layers) - 1)
    for depth in (2, 1, 0):
        out = size * 16 // 4**depth
        layers.append(MadeLayer(out, 0.004 / 2**depth, 0.008 / 2**depth))
        layers.append(MadeLayer(out, 0.02 / 2**depth, 0.04 / 2**depth, out // 2, (), ends[depth]))
        layers.append(MadeLayer(out, 0.02 / 2**depth, 0.04 / 2**depth, out // 2))
    layers.append(MadeLayer(size // 16, 0.002, 0.004))
    return made_profile(layers)


def gpt_like(num_blocks: int = 2, saved_each: int = 4, size: int = MIB) -> StepProfile:
    """Equal blocks that save several tensors of different sizes, then a head with a large one."""
    draw = random.Random(num_blocks)
    layers = [MadeLayer(size, 0.0005, 0.0005)]
    for _ in range(num_blocks):
        sizes = [size * draw.choice((1, 1, 1, 3, 4)) for _ in range(saved_each)]
        layers.append(MadeLayer(size, 0.012, 0.024, 2 * size, tuple(Saved(each) for each in sizes)))
    layers.append(MadeLayer(size * 8, 0.006, 0.012, size * 2, (Saved(size * 8),)))
    return made_profile(layers)


def random_profile(draw: random.Random, num_layers: int) -> StepProfile:
    """Layers of any size and time, with saved tensors and skips here and there."""
    layers: list[MadeLayer] = []
    for number in range(num_layers):
        saved = tuple(
            Saved(draw.randrange(1, 40) * 100_000) for _ in range(draw.choice((0, 0, 1, 2)))
        )
        skip = draw.randrange(number - 1) if number > 2 and draw.random() < 0.25 else None
        layers.append(
            MadeLayer(
                draw.randrange(1, 60) * 100_000,
                draw.uniform(0, 0.01),
                draw.uniform(0, 0.02),
                draw.randrange(60) * 50_000,
                saved,
                skip,
            )
        )
    return made_profile(layers)


def recipe_of(*sources: int, seconds: float = 0.0, extra_bytes: int = 0) -> Recipe:
    """A recipe that reads some storages."""
    arguments = tuple(TensorArgument(source, "uint8", (1,), (1,), 0) for source in sources)
    return Recipe((Call("torch.cat", (arguments,)),), Made(0, 0), seconds, extra_bytes)


def with_recipes(profile: StepProfile, draw: random.Random, part: float = 0.7) -> StepProfile:
    """The profile with recipes of any cost for a part of its storages, from any they may read."""
    storages = []
    for storage in profile.storages:
        able = [each.number for each in profile.storages if can_read(storage, each)]
        if storage.bring is not None and draw.random() < part:
            sources = draw.sample(able, min(len(able), draw.choice((0, 1, 1, 2))))
            seconds = draw.choice((0.01, 0.1, 1)) * storage.num_bytes / 1e9
            extra_bytes = draw.choice((0, 100, storage.num_bytes // 2))
            recipe = recipe_of(*sources, seconds=seconds, extra_bytes=extra_bytes)
            storage = replace(storage, recipe=recipe)
        storages.append(storage)
    return replace(profile, storages=tuple(storages))


def gap_bandwidth(profile: StepProfile, steps: float) -> float:
    """Bytes per second at which all moves out and in within ``steps`` times the compute."""
    num_bytes = 2 * sum(storage.num_bytes for storage in profile.storages)
    return num_bytes / (steps * profile.compute_seconds)


MODELS: dict[str, Callable[[], StepProfile]] = {
    "cnn": cnn_like,
    "unet": unet_like,
    "gpt": gpt_like,
}


class Case(NamedTuple):
    """A step, a budget between the floor and keeping all, and a link that moves all in ``steps``.

    ``part`` is the budget's place between the two; ``steps`` are multiples of the compute.
    """

    name: str
    profile: StepProfile
    part: float
    steps: float
    link: SwapLink
    budget: int


def made_cases(*names: str) -> Iterator[Case]:
    """Nine cases for each model, of all models by default."""
    for name in names or MODELS:
        profile = MODELS[name]()
        for part in (0.25, 0.5, 0.75):
            for steps in (0.5, 1, 2):
                rate = gap_bandwidth(profile, steps)
                link = SwapLink(rate, rate)
                yield Case(name, profile, part, steps, link, budget_at(profile, part))


def budget_at(profile: StepProfile, part: float) -> int:
    floor, keep_all = floor_bytes(profile), peak_bytes(profile, ())
    return floor + int((keep_all - floor) * part)


def tangled_profile(draw: random.Random, num_storages: int) -> StepProfile:
    """Anything a profile may say: packs late in the step, storages never used or held elsewhere."""
    ticks = sorted(draw.sample(range(1, 40 * num_storages), 4 * num_storages))
    deltas = [draw.randrange(300_000) for _ in range(40 * num_storages + 5)]
    deltas = [draw.choice((1, -1)) * delta for delta in deltas]
    for position in ticks:
        deltas[position] = 0
    storages = []
    for pack in sorted(draw.sample(range(3 * num_storages), num_storages)):
        use = draw.randrange(pack + 1, len(ticks)) if draw.random() < 0.85 else None
        bring = None if use is None else ticks[use] + 1
        free = draw.randrange(ticks[pack], len(deltas)) if draw.random() < 0.9 else None
        release = draw.randrange(bring or ticks[pack], len(deltas))
        storages.append(
            SavedStorage(
                number=len(storages),
                num_bytes=draw.randrange(1, 5_000_000),
                made_by="",
                pack_ticks=(pack,),
                unpack_ticks=() if use is None else (use,),
                free=free,
                bring=bring,
                release=release if draw.random() < 0.8 else None,
            )
        )
    first_use = min((x.unpack_ticks[0] for x in storages if x.unpack_ticks), default=len(ticks))
    return StepProfile(
        seconds_before=draw.random(),
        seconds=tuple(draw.choice((0.0, draw.random())) for _ in ticks),
        num_forward_ticks=first_use,
        tick_positions=tuple(ticks),
        deltas=tuple(deltas),
        static_bytes=20_000_000,
        smallest_bytes=1,
        storages=tuple(storages),
    )
