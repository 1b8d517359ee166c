"""Training scripts: the user's own Python file, which defines a model and its data.

A script has three functions, by these names, and may have three more::

    def make_model() -> nn.Module: ...
    def make_batch(generator: torch.Generator) -> tuple[inputs, targets]: ...
    def loss_fn(outputs, targets) -> torch.Tensor: ...
    def make_optimizer(parameters) -> torch.optim.Optimizer: ...
    def make_scheduler(optimizer, num_steps: int) -> LRScheduler: ...
    def make_microbatches(inputs, targets, count: int) -> list[Microbatch]: ...

``make_model`` draws its weights with torch's random numbers, which are seeded before.
``make_batch`` gives one minibatch; everything random in it comes from ``generator``. ``inputs`` are
a tensor, a tuple of positional or a dict of named arguments of the model. ``loss_fn`` gives a
tensor of one number. ``make_optimizer`` is given the parameters of one stage; ``make_scheduler``
its optimizer, and the number of updates to come: it steps after each. ``make_microbatches`` cuts a
minibatch, for pipelines with ``--semantics flush``, into ``count`` of any shapes, each row into one
of them; without it they have equally many of the rows as they come.

The file is run because its user names it, as ``python SCRIPT`` would: with its own folder among
those that it imports from.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from elbowroom.core.errors import InputError
from elbowroom.training.microbatch import Microbatch, Minibatch

_FUNCTIONS = ("make_model", "make_batch", "loss_fn")
_MORE_FUNCTIONS = ("make_optimizer", "make_scheduler", "make_microbatches")

_DEFAULT_RATE = 1e-3

Made = TypeVar("Made")
OptimizerFunction = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainingScript:
    """The functions of a script; errors raised from them name the script."""

    path: Path
    functions: dict[str, Callable[..., Any]]

    def make_model(self, seed: int) -> nn.Module:
        """The script's model, with torch's random numbers seeded by ``seed``.

        Raises InputError if the script fails, or gives something else.
        """
        torch.manual_seed(seed)
        return self._made("make_model", nn.Module)

    def make_batch(self, generator: torch.Generator) -> tuple[Any, Any]:
        """Inputs and targets of one minibatch. Raises InputError as ``make_model`` does."""
        batch = self._call("make_batch", generator)
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise InputError(f"{self.path}: make_batch must return a tuple (inputs, targets)")
        return batch

    @property
    def cuts_microbatches(self) -> bool:
        return "make_microbatches" in self.functions

    def make_microbatches(self, batch: Minibatch, count: int) -> list[Microbatch]:
        """The script's own microbatches of a minibatch. Raises InputError as ``make_model`` does.

        How many there are is checked where they are trained.
        """
        inputs, targets = batch
        made = self._call("make_microbatches", inputs, targets, count)
        if not isinstance(made, list) or not all(isinstance(part, Microbatch) for part in made):
            raise InputError(
                f"{self.path}: make_microbatches must return a list of elbowroom.Microbatch"
            )
        return made

    @property
    def loss_fn(self) -> Callable[[Any, Any], torch.Tensor]:
        """The script's own loss, from outputs and targets; its errors are not wrapped."""
        return self.functions["loss_fn"]

    def optimizer_fn(self, lr: float | None = None) -> OptimizerFunction:
        """The script's ``make_optimizer``, or AdamW with learning rate ``lr`` (default 1e-3).

        Raises InputError for an ``lr`` given to a script with its own optimizer, which would ignore
        it.
        """
        if "make_optimizer" not in self.functions:
            return partial(torch.optim.AdamW, lr=_DEFAULT_RATE if lr is None else lr)
        if lr is not None:
            raise InputError(f"{self.path} makes its own optimizer: set the learning rate there")
        return self.make_optimizer

    @property
    def has_scheduler(self) -> bool:
        return "make_scheduler" in self.functions

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The script's optimizer for ``parameters``. Raises InputError as ``make_model`` does."""
        return self._made("make_optimizer", torch.optim.Optimizer, parameters)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> LRScheduler:
        """The script's scheduler for ``num_steps`` updates.

        Raises InputError as ``make_model`` does.
        """
        return self._made("make_scheduler", LRScheduler, optimizer, num_steps)

    def _made(self, name: str, kind: type[Made], *args: Any) -> Made:
        made = self._call(name, *args)
        if not isinstance(made, kind):
            expected = f"{kind.__module__}.{kind.__name__}"
            raise InputError(f"{self.path}: {name} must return a {expected}, not {made!r}")
        return made

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return self.functions[name](*args)
        except Exception as error:
            raise InputError(f"{self.path}: {name} failed: {_told(error, self.path)}") from error


def load_script(path: Path) -> TrainingScript:
    """Run a script file. Raises InputError if it cannot be read, fails, or lacks a function."""
    if not path.is_file():
        raise InputError(f"there is no script {path}: give a Python file")
    name = f"elbowroom_script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    # The folder stays on the path: functions may import their neighbours when they are called.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} failed: {_told(error, path)}") from error
    missing = [name for name in _FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise InputError(
            f"{path} defines no {', '.join(missing)}: a training script has the functions "
            "make_model(), make_batch(generator) and loss_fn(outputs, targets)"
        )
    more = [name for name in _MORE_FUNCTIONS if hasattr(module, name)]
    return TrainingScript(path, {name: getattr(module, name) for name in (*_FUNCTIONS, *more)})


def _told(error: BaseException, path: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}"
