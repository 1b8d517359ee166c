"""Facts about devices and the links between them, from TOML: presets, or what was measured."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from elbowroom.core.errors import InputError
from elbowroom.core.units import parse_bytes

PRESETS = ("h20-8", "h100-8", "h200-8", "b200-8", "a100-80-8")


@dataclass(frozen=True)
class Rate:
    """A peak per second, and the fraction of it that real kernels reach."""

    peak: float
    fraction: float = 1.0

    @property
    def achieved(self) -> float:
        return self.peak * self.fraction


@dataclass(frozen=True)
class MatmulPoint:
    """Measured: with ``rows`` rows, a matrix product passes so many weight elements per second."""

    rows: int
    elements_per_second: float


@dataclass(frozen=True)
class Device:
    """One device: rates in FLOP/s and bytes/s, fixed costs in seconds.

    ``matmul`` is empty for presets: then a product takes the larger of reading its weights and of
    its FLOPs. ``copies_overlap`` says that a copy engine works beside the kernels; where it is
    False (a CPU core) a copy costs compute. ``maps_peers`` says that kernels read a peer's memory
    as fast as their own.
    """

    name: str
    memory_bytes: int
    memory_fraction: float
    flops: Rate
    flops_fp8: Rate
    memory_bandwidth: Rate
    attention_flops: Rate
    attention_bandwidth: Rate
    elementwise_bandwidth: Rate
    layer_seconds: float
    iteration_seconds: float
    row_seconds: float
    copies_overlap: bool = True
    maps_peers: bool = False
    matmul: tuple[MatmulPoint, ...] = ()

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.memory_fraction)

    def with_rates(self, change: Callable[[Rate], Rate], factor: float) -> Device:
        """The device with every rate changed; measured products take ``factor`` times as long."""
        points = (MatmulPoint(p.rows, p.elements_per_second / factor) for p in self.matmul)
        return replace(
            self,
            flops=change(self.flops),
            flops_fp8=change(self.flops_fp8),
            memory_bandwidth=change(self.memory_bandwidth),
            attention_flops=change(self.attention_flops),
            attention_bandwidth=change(self.attention_bandwidth),
            elementwise_bandwidth=change(self.elementwise_bandwidth),
            matmul=tuple(points),
        )

    def matmul_seconds(
        self, rows: float, read: float, active: float, element_bytes: int = 2
    ) -> float:
        """A product of ``rows`` rows with a matrix that lies in this device's memory.

        Args:
            rows: rows (tokens) of the left side.
            read: weight elements that are read.
            active: weight elements that each row is multiplied with; ``read`` but for mixtures.
            element_bytes: size of a weight; 1 is FP8 and computed at its rate.

        """
        if self.matmul:
            # A mixture's rows meet a part of what is read: as many rows on average per matrix.
            return read / self._elements_per_second(rows * active / read)
        flops = self.flops_fp8 if element_bytes == 1 else self.flops
        return max(
            read * element_bytes / self.memory_bandwidth.achieved,
            2 * rows * active / flops.achieved,
        )

    def _elements_per_second(self, rows: float) -> float:
        """Seconds per element are linear between measured points, and in rows beyond the last."""
        points = [point.rows for point in self.matmul]
        seconds = [1 / point.elements_per_second for point in self.matmul]
        if rows > points[-1]:
            return points[-1] / (rows * seconds[-1])
        return 1 / float(np.interp(rows, points, seconds))


@dataclass(frozen=True)
class Link:
    """What joins devices at one level of the hierarchy.

    ``num_devices`` devices reach each other, each with ``bandwidth`` bytes/s out and as much in.
    ``latency_seconds`` is the time from asking for a small message to having it.
    """

    name: str
    num_devices: int
    bandwidth: Rate
    latency_seconds: float

    def transfer_seconds(self, num_bytes: float) -> float:
        """Alpha + n / beta."""
        return self.latency_seconds + num_bytes / self.bandwidth.achieved

    def all_reduce_seconds(self, num_bytes: float, num_devices: int) -> float:
        """The better of one shot, where each reads the p-1 others, and a ring.

        A ring sends 2 (p-1) messages of n/p bytes (Thakur et al. 2005, alpha-beta).
        """
        if num_devices == 1:
            return 0.0
        others = num_devices - 1
        one_shot = self.transfer_seconds(others * num_bytes)
        ring = 2 * others * self.transfer_seconds(num_bytes / num_devices)
        return min(one_shot, ring)


@dataclass(frozen=True)
class Cluster:
    """Equal devices, and links from the nearest level to the farthest.

    Times made of these facts are right within a fraction of ``uncertainty``: what a prediction's
    interval is made of.
    """

    name: str
    num_devices: int
    device: Device
    links: tuple[Link, ...]
    uncertainty: float = 0.35
    sources: dict[str, str] = field(default_factory=dict, hash=False)

    def link(self, num_devices: int) -> Link:
        """The nearest level that joins ``num_devices`` devices. Raises InputError if none does."""
        for link in self.links:
            if link.num_devices >= num_devices:
                return link
        raise InputError(
            f"{self.name} has no link that joins {num_devices} devices: add one to its [[links]]"
        )

    @property
    def node_devices(self) -> int:
        """Devices that reach each other over the nearest links."""
        return self.links[0].num_devices if self.links else 1

    def with_memory(self, memory_bytes: int) -> Cluster:
        """The same devices, of which the engine may use ``memory_bytes`` each."""
        device = replace(self.device, memory_bytes=memory_bytes, memory_fraction=1.0)
        return replace(self, device=device)

    def slowed(self, factor: float) -> Cluster:
        """The same cluster with everything that a device does ``factor`` times as long."""

        def slower(rate: Rate) -> Rate:
            return replace(rate, fraction=rate.fraction / factor)

        device = self.device.with_rates(slower, factor)
        slow = replace(
            device,
            layer_seconds=device.layer_seconds * factor,
            iteration_seconds=device.iteration_seconds * factor,
            row_seconds=device.row_seconds * factor,
        )
        return replace(self, device=slow)

    def to_toml(self) -> str:
        """What ``read_cluster`` reads back as an equal cluster."""
        table = asdict(self)
        table["device"]["memory"] = table["device"].pop("memory_bytes")
        return tomli_w.dumps(table)


def read_cluster(name: str | Path) -> Cluster:
    """A preset by its name, or a TOML file.

    Raises InputError when there is none, or when a number is missing or impossible.
    """
    if str(name) in PRESETS:
        text = (resources.files("elbowroom.core") / "clusters" / f"{name}.toml").read_text()
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(
                f"no cluster '{name}': give one of {', '.join(PRESETS)}, or a file such as "
                f"`elbowroom profile` writes ({error})"
            ) from error
    try:
        return parse_cluster(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"cluster {name} is not valid TOML: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"cluster {name}: {_what_is_wrong(error)}") from error


def parse_cluster(data: dict[str, Any]) -> Cluster:
    """A cluster from TOML's tables. Raises KeyError, TypeError or ValueError."""
    device = data["device"]
    flops = _rate(device, "flops")
    bandwidth = _rate(device, "memory_bandwidth")
    memory = device["memory"]
    return Cluster(
        name=str(data["name"]),
        num_devices=int(_positive(data, "num_devices")),
        device=Device(
            name=str(device["name"]),
            memory_bytes=parse_bytes(memory) if isinstance(memory, str) else int(memory),
            memory_fraction=_positive(device, "memory_fraction", 0.9),
            flops=flops,
            flops_fp8=_rate(device, "flops_fp8", flops),
            memory_bandwidth=bandwidth,
            attention_flops=_rate(device, "attention_flops", flops),
            attention_bandwidth=_rate(device, "attention_bandwidth", bandwidth),
            elementwise_bandwidth=_rate(device, "elementwise_bandwidth", bandwidth),
            layer_seconds=_seconds(device, "layer_seconds"),
            iteration_seconds=_seconds(device, "iteration_seconds"),
            row_seconds=_seconds(device, "row_seconds"),
            copies_overlap=bool(device.get("copies_overlap", True)),
            maps_peers=bool(device.get("maps_peers", False)),
            matmul=tuple(
                MatmulPoint(int(_positive(p, "rows")), _positive(p, "elements_per_second"))
                for p in sorted(device.get("matmul", ()), key=lambda point: point["rows"])
            ),
        ),
        links=tuple(
            Link(
                name=str(link["name"]),
                num_devices=int(_positive(link, "num_devices")),
                bandwidth=_rate(link, "bandwidth"),
                latency_seconds=_seconds(link, "latency_seconds"),
            )
            for link in sorted(data.get("links", ()), key=lambda link: link["num_devices"])
        ),
        uncertainty=_positive(data, "uncertainty", 0.35),
        sources={str(key): str(value) for key, value in data.get("sources", {}).items()},
    )


def _rate(table: dict[str, Any], key: str, default: Rate | None = None) -> Rate:
    """``key`` is a number, or a table with ``peak`` and ``fraction``."""
    value = table[key] if default is None else table.get(key, default)
    if isinstance(value, Rate):
        return value
    if isinstance(value, dict):
        return Rate(_positive(value, "peak"), _positive(value, "fraction", 1.0))
    return Rate(_positive(table, key))


def _positive(table: dict[str, Any], key: str, default: float | None = None) -> float:
    value = table[key] if default is None else table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"'{key}' must be a positive number, not {value!r}")
    return float(value)


def _seconds(table: dict[str, Any], key: str) -> float:
    value = table.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise ValueError(f"'{key}' must be a number of seconds, not {value!r}")
    return float(value)


def _what_is_wrong(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
