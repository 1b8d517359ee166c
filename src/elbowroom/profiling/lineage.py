"""Which calls wrote a tensor's storage, noted while a model's forward runs; holds no tensor.

Calls are seen where Python makes them, above autograd and autocast: what runs below is the same,
allocation for allocation, as without (a dispatch mode changes which kernels PyTorch chooses).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from elbowroom.core.recipe import Argument, Call, Made, Setting, TensorArgument
from elbowroom.swap.candidates import is_as_stored
from elbowroom.swap.meter import Meter
from elbowroom.swap.recompute import fixed_tensors, replayable_functions

_MOST_CALLS = 8
"""Most calls of one recipe: longer ones cost as much as a forward."""

_OWN_STATISTICS = {
    "torch.nn.functional.batch_norm": "training",
    "torch.nn.functional.instance_norm": "use_input_stats",
}
"""Functions that write running statistics (arguments 1 and 2) and do not read them, if so told."""


class State(NamedTuple):
    """A storage as it was at a version of its tensors."""

    storage: int
    version: int


@dataclass(frozen=True)
class _Read:
    """A tensor that a call was given."""

    state: State
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class _Noted:
    """A call, with reads in the place of tensors; ``begin`` and ``end`` are places in the log."""

    place: int
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[_Read]
    begin: int
    end: int = 0
    made: dict[int, int] = field(default_factory=dict)
    """Storages that it made, with the number of the output."""
    written: set[int] = field(default_factory=set)
    """Storages that it was given and wrote into."""


@dataclass(eq=False)
class _Traced:
    """A storage that a call made: the calls that wrote it, with the version after each."""

    writes: list[tuple[int, _Noted]]
    is_known: bool = True

    def calls(self, version: int) -> list[_Noted]:
        """Calls that wrote what it holds at a version; none if somebody else wrote, too."""
        until = [(after, call) for after, call in self.writes if after <= version]
        is_known = self.is_known and until and until[-1][0] == version
        return [call for _, call in until] if is_known else []


class Draft(NamedTuple):
    """A recipe without its costs; ``windows`` are its calls' parts of the allocator's log."""

    calls: tuple[Call, ...]
    result: Made
    sources: frozenset[int]
    windows: tuple[tuple[int, int], ...]


class _NotReplayableError(Exception):
    """A call that no recipe can hold."""


class Lineage(TorchFunctionMode):
    """Notes the calls inside of ``with lineage:`` that could be replayed.

    What is written by anything else is known by its version, and has no recipe. Under autocast
    nothing is noted: what is called is not what is computed then.
    """

    def __init__(self, model: nn.Module, meter: Meter) -> None:
        super().__init__()
        self._meter = meter
        self._names = {function: name for name, function in replayable_functions().items()}
        self._fixed = fixed_tensors(model)
        self._name_of = {_cdata(each): name for name, each in self._fixed.items()}
        self._traced: dict[int, _Traced] = {}
        self._references: dict[int, StorageWeakRef] = {}
        self._num_noted = 0
        self._spent_seconds = 0.0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        begin = time.perf_counter()
        noted = self._note(func, args, kwargs)
        called = time.perf_counter()
        result = func(*args, **kwargs)
        returned = time.perf_counter()
        if noted is not None:
            self._note_result(noted, args, kwargs, result)
        self._spent_seconds += time.perf_counter() - returned + called - begin
        return result

    def spent_seconds(self) -> float:
        """Seconds that noting took since this was last asked."""
        spent, self._spent_seconds = self._spent_seconds, 0.0
        return spent

    def state_of(self, storage: torch.UntypedStorage, version: int) -> State:
        """A storage's state, whose identity no later storage takes: it is referred to weakly."""
        identity = int(storage._cdata)
        if identity not in self._references:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._references[identity] = reference
        return State(identity, version)

    def draft(self, target: State, saved: Mapping[State, int]) -> Draft | None:
        """The calls that wrote a storage, from those ``saved`` before and what the model owns.

        None if it was written by something else, or by too many calls.
        """
        needed: dict[_Noted, None] = {}
        waiting, visited = [target], {target}
        while waiting:
            state = waiting.pop()
            traced = self._traced.get(state.storage)
            calls = traced.calls(state.version) if traced else []
            if not calls:
                return None
            needed.update(dict.fromkeys(calls))
            if len(needed) > _MOST_CALLS:
                return None
            for read in (read for call in calls for read in call.reads):
                is_there = read.state in saved or self._is_fixed(read.state)
                if read.state not in visited and not is_there:
                    visited.add(read.state)
                    waiting.append(read.state)
        try:
            return self._drafted(sorted(needed, key=lambda call: call.place), target, saved)
        except _NotReplayableError:
            return None

    def _drafted(self, calls: list[_Noted], target: State, saved: Mapping[State, int]) -> Draft:
        """Write calls down, in order. Raises _NotReplayableError if they take what is not there."""
        made: dict[int, Made] = {}
        sources: set[int] = set()

        def source(state: State) -> int | str | Made:
            if state.storage in made:
                return made[state.storage]
            if state in saved:
                sources.add(saved[state])
                return saved[state]
            if state.storage in self._name_of:
                return self._name_of[state.storage]
            raise _NotReplayableError

        drafted = []
        for number, call in enumerate(calls):
            if not call.written <= made.keys():
                raise _NotReplayableError  # it writes into what it may only read
            args = tuple(_filled(each, source) for each in call.args)
            kwargs = {key: _filled(each, source) for key, each in call.kwargs.items()}
            drafted.append(Call(call.function, args, kwargs))
            made |= {storage: Made(number, output) for storage, output in call.made.items()}
        if target.storage not in made:
            raise _NotReplayableError
        windows = tuple((call.begin, call.end) for call in calls)
        return Draft(tuple(drafted), made[target.storage], frozenset(sources), windows)

    def _is_fixed(self, state: State) -> bool:
        name = self._name_of.get(state.storage)
        return name is not None and self._fixed[name]._version == state.version

    def _note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Noted | None:
        name = self._names.get(func)
        if name is None or torch.is_autocast_enabled("cpu"):
            return None
        flag = _OWN_STATISTICS.get(name)
        if flag is not None and kwargs.get(flag):
            args = (args[0], None, None, *args[3:])
        reads: list[_Read] = []
        try:
            noted_args = tuple(self._noted(each, reads) for each in args)
            noted_kwargs = {key: self._noted(each, reads) for key, each in kwargs.items()}
        except (_NotReplayableError, RuntimeError):
            return None
        self._num_noted += 1
        place, begin = self._num_noted, self._meter.num_entries
        return _Noted(place, name, noted_args, noted_kwargs, reads, begin)

    def _noted(self, value: Any, reads: list[_Read]) -> Any:
        """An argument with reads in the place of tensors. Raises _NotReplayableError."""
        if isinstance(value, torch.Tensor):
            if not _is_plain(value):
                raise _NotReplayableError
            state = self.state_of(value.untyped_storage(), value._version)
            shape, offset = tuple(value.shape), int(value.storage_offset())
            reads.append(_Read(state, value.dtype, shape, value.stride(), offset))
            return reads[-1]
        if isinstance(value, list | tuple):
            return tuple(self._noted(each, reads) for each in value)
        return _constant(value)

    def _note_result(
        self, noted: _Noted, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        noted.end = self._meter.num_entries
        given = {_cdata(each): each for each in _tensors((*args, *kwargs.values()))}
        for storage, before in dict(read.state for read in noted.reads).items():
            after = given[storage]._version
            if after != before:
                noted.written.add(storage)
                if traced := self._traced.get(storage):
                    traced.is_known &= traced.writes[-1][0] == before
                    traced.writes.append((after, noted))
        for output, tensor in enumerate(result if isinstance(result, list | tuple) else (result,)):
            if not _is_plain(tensor):
                continue
            storage = _cdata(tensor)
            if storage not in given and storage not in self._traced:
                self.state_of(tensor.untyped_storage(), 0)
                self._traced[storage] = _Traced([(tensor._version, noted)])
                noted.made[storage] = output


def _constant(value: Any) -> Argument:
    if isinstance(value, torch.dtype | torch.memory_format):
        is_dtype = isinstance(value, torch.dtype)
        return Setting("dtype" if is_dtype else "memory_format", str(value).removeprefix("torch."))
    if isinstance(value, torch.device) and value.type == "cpu":
        return Setting("device", "cpu")
    is_finite = type(value) is not float or math.isfinite(value)
    if is_finite and (value is None or type(value) in (bool, int, float, str)):
        constant: Argument = value
        return constant
    raise _NotReplayableError


def _filled(value: Any, source: Callable[[State], int | str | Made]) -> Argument:
    if isinstance(value, _Read):
        dtype = str(value.dtype).removeprefix("torch.")
        return TensorArgument(source(value.state), dtype, value.shape, value.stride, value.offset)
    if isinstance(value, tuple):
        return tuple(_filled(each, source) for each in value)
    argument: Argument = value
    return argument


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor) and _is_plain(value):
            yield value


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that its storage and strides describe."""
    is_tensor = type(value) in (torch.Tensor, nn.Parameter)
    return is_tensor and is_as_stored(value) and not value.is_inference()


def _cdata(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
