"""The order of copies and compute on a device's streams, tried on a CPU with ``FakeDevice``.

Each wait and each record of ``DeviceStreamer`` is left out once, and must be missed.
"""

from __future__ import annotations

import ast
import random
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from elbowroom.pool import streamer as streamer_module
from elbowroom.pool.streamer import DeviceStreamer
from tests.pool.fake_device import CaptureError, FakeDevice, FakeStream, Graph
from tests.pool.fake_operations import Issuing
from tests.pool.streamed import (
    FETCHES,
    LAYERS,
    NUM_LAYERS,
    published,
    run_plainly,
    run_streamed,
)

CPU = torch.device("cpu")
WIDTH, NUM_ROWS = 8, 2
SLOTS = (1, 2, 3)
COPY_PACES = (1e-4, 1.0, 1e4)  # copies come as late as they may, at any time, as early as they may
NUM_PASSES = 12
ORDERING_CALLS = {"record", "wait", "wait_event", "wait_stream", "synchronize"}

SOURCE = Path(streamer_module.__file__).read_text()


class _Pass(NamedTuple):
    """What a pass gave, once its stream has run, and what it was to give."""

    out: torch.Tensor
    expected: torch.Tensor


class _Stack:
    """Products one after the other; those of ``LAYERS`` come through the streamer.

    ``leave_out`` names a call that a caller of the streamer has to make, and that this one leaves
    out: "sync before replay", "join", or none.
    """

    def __init__(
        self,
        device: FakeDevice,
        streamer: DeviceStreamer,
        weights: torch.Tensor,
        leave_out: str,
    ) -> None:
        self.streamer = streamer
        self._weights = weights
        self._leave_out = leave_out
        self._device = device
        self._x = torch.zeros(NUM_ROWS, WIDTH)
        self._graphs: list[tuple[Graph, torch.Tensor]] = []
        self._passes: list[_Pass] = []

    @property
    def num_wrong(self) -> int:
        """Wrong passes among those so far, whose streams have all run."""
        return sum(not torch.equal(one.out, one.expected) for one in self._passes)

    def eager_pass(self, value: float) -> None:
        self._x.fill_(value)
        self._note(self._run(), value)

    def broken_off_pass(self, num_layers: int) -> None:
        """The first layers of a pass, as when a request fails, and the next pass begins anew."""
        self._run(num_layers)
        self.streamer.restart()

    def capture(self, stream: FakeStream) -> None:
        """Capture a pass on ``stream``; like vLLM, call ``sync`` there and not on compute's."""
        graph = Graph(self._device)
        with self._device.stream(stream):
            self.streamer.sync()
            with graph.capturing(stream):
                out = self._run()
                if self._leave_out != "join":
                    self.streamer.join()
        self._graphs.append((graph, out))

    def replay(self, number: int, value: float) -> None:
        graph, out = self._graphs[number]
        self._x.fill_(value)
        if self._leave_out != "sync before replay":
            self.streamer.sync()
        graph.replay()
        self._note(out.clone(), value)

    def _run(self, num_layers: int = NUM_LAYERS) -> torch.Tensor:
        return run_streamed(self.streamer, self._weights[:num_layers], self._x)

    def _note(self, out: torch.Tensor, value: float) -> None:
        expected = run_plainly(self._weights, torch.full((NUM_ROWS, WIDTH), value))
        self._passes.append(_Pass(out, expected))


class _Setting(NamedTuple):
    num_slots: int
    copy_pace: float
    seed: int


Streamer = type[DeviceStreamer]


def _make(
    streamer_class: Streamer, setting: _Setting, leave_out: str = ""
) -> tuple[FakeDevice, _Stack, dict[int, torch.Tensor]]:
    device = FakeDevice(setting.seed, setting.copy_pace)
    torch.manual_seed(0)
    weights = torch.randn(NUM_LAYERS, WIDTH, WIDTH)
    sources = published(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda _: device)
        streamer = streamer_class(FETCHES, sources, setting.num_slots, CPU)
    return device, _Stack(device, streamer, weights, leave_out), sources


@torch.inference_mode()
def _wrong_eager(streamer_class: Streamer, setting: _Setting) -> int:
    """Count wrong ones among eager passes, whole ones and some that were broken off."""
    device, stack, _ = _make(streamer_class, setting)
    choices = random.Random(setting.seed)
    with Issuing(device):
        stack.streamer.start()
        for number in range(1, NUM_PASSES + 1):  # at 0 all weights give the same
            if choices.randrange(3) == 0:
                stack.broken_off_pass(choices.randrange(NUM_LAYERS))
            stack.eager_pass(number / NUM_PASSES)
        device.synchronize()
    return stack.num_wrong


@torch.inference_mode()
def _wrong_mixed(streamer_class: Streamer, setting: _Setting, leave_out: str = "") -> int:
    """Count wrong ones among eager passes and replays of two graphs. May raise CaptureError."""
    device, stack, _ = _make(streamer_class, setting, leave_out)
    choices = random.Random(setting.seed)
    with Issuing(device):
        stack.streamer.start()
        stack.eager_pass(-0.1)
        captures = device.Stream()
        stack.capture(captures)
        stack.capture(captures)
        for number in range(1, NUM_PASSES + 1):  # at 0 all weights give the same
            # Seeds take turns in what comes first after the captures.
            choice = choices.randrange(3) if number > 1 else setting.seed % 2
            if choice == 0:
                stack.eager_pass(number / NUM_PASSES)
            else:
                stack.replay(choice - 1, number / NUM_PASSES)
        device.synchronize()
    return stack.num_wrong


@torch.inference_mode()
def _unread_after_close(streamer_class: Streamer, setting: _Setting) -> int:
    """Count copies that read their source after ``close``, when its owner may have freed it."""
    device, stack, sources = _make(streamer_class, setting)
    ahead = [sources[layer].clone() for layer in LAYERS[: setting.num_slots]]
    with Issuing(device):
        stack.streamer.start()
        stack.eager_pass(0.5)
        stack.streamer.close()
    for source in sources.values():
        source.fill_(255)
    device.synchronize()
    slots = stack.streamer.buffers
    return sum(not torch.equal(slot, one) for slot, one in zip(slots, ahead, strict=True))


def _settings(slots: Iterable[int], num_seeds: int) -> list[_Setting]:
    return [_Setting(*one) for one in product(slots, COPY_PACES, range(num_seeds))]


def _fails(streamer_class: Streamer, num_slots: int, leave_out: str = "") -> bool:
    """Tell whether one of few runs gives a wrong result or breaks a rule of CUDA's captures."""
    for setting in _settings([num_slots], 2):
        try:
            if (
                _wrong_eager(streamer_class, setting)
                or _wrong_mixed(streamer_class, setting, leave_out)
                or _unread_after_close(streamer_class, setting)
            ):
                return True
        except CaptureError:
            return True
    return False


@pytest.mark.parametrize("setting", _settings(SLOTS, 2), ids=str)
def test_no_order_of_streams_gives_wrong_results(setting: _Setting) -> None:
    assert _wrong_eager(DeviceStreamer, setting) == 0
    assert _wrong_mixed(DeviceStreamer, setting) == 0
    assert _unread_after_close(DeviceStreamer, setting) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100))
def test_no_order_of_streams_gives_wrong_results_nightly(seed: int) -> None:
    for num_slots in (*SLOTS, len(LAYERS)):
        setting = _Setting(num_slots, 10 ** random.Random(seed).uniform(-4, 4), seed)
        assert _wrong_eager(DeviceStreamer, setting) == 0, setting
        assert _wrong_mixed(DeviceStreamer, setting) == 0, setting


def _mutant(source: str) -> Streamer:
    """Make the streamer of a changed source of its module."""
    module = ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), vars(module))
    streamer_class: Streamer = module.DeviceStreamer
    return streamer_class


def _ordering_lines() -> dict[str, int]:
    """Find the lines on which ``DeviceStreamer`` records or waits, each a statement of its own."""
    lines = {}
    for method in (
        node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)
    ):
        for node in ast.walk(method):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Attribute)
                and node.value.func.attr in ORDERING_CALLS
            ):
                lines[f"{method.name}: {ast.unparse(node)}"] = node.lineno - 1
    return lines


@pytest.mark.parametrize("num_slots", SLOTS)
@pytest.mark.parametrize("line", _ordering_lines().values(), ids=_ordering_lines().keys())
def test_every_wait_and_every_record_is_needed(line: int, num_slots: int) -> None:
    lines = SOURCE.splitlines()
    lines[line] = lines[line].replace(lines[line].strip(), "pass")
    assert _fails(_mutant("\n".join(lines)), num_slots)


def test_waits_and_records_are_found() -> None:
    """Otherwise the test above would try nothing."""
    methods = Counter(name.split(":")[0] for name in _ordering_lines())
    assert methods == {"acquire": 2, "sync": 1, "join": 1, "close": 1, "_fetch": 3}


COPY = "            slot.buffer[: source.numel()].copy_(source, non_blocking=True)\n"
READY = "            self._ready[slot.index].record()\n"
FREE = "        self._free[slot.index].record()\n"
COPIES = "        with self._device.stream(copies):\n"
MISTAKES = {
    "ready before the copy": (COPY + READY, READY + COPY),
    "ready recorded by compute": (COPY + READY, COPY + READY.removeprefix("    ")),
    "free recorded by the copies": (COPIES, COPIES + "    " + FREE),
    "a graph's event is waited for outside": (
        "if self._recorded_in[slot.index] == here:",
        "if True:",
    ),
    "no event is ever a complete graph's": ('self._recorded_in[slot.index] = "graph"', "pass"),
    "captures are not seen": (
        '"capture" if self._is_capturing() else "stream"\n        self',
        '"stream"\n        self',
    ),
}


@pytest.mark.parametrize("num_slots", SLOTS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, num_slots: int) -> None:
    right, wrong = MISTAKES[mistake]
    assert SOURCE.count(right) == 1
    assert _fails(_mutant(SOURCE.replace(right, wrong)), num_slots)


@pytest.mark.parametrize("num_slots", SLOTS)
@pytest.mark.parametrize("call", ["sync before replay", "join"])
def test_calls_around_graphs_are_needed(call: str, num_slots: int) -> None:
    assert _fails(DeviceStreamer, num_slots, leave_out=call)
