"""Cluster TOML: presets, measured machines and clusters of one's own, read into ``Cluster``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from elbowroom.core.cluster import Cluster, Device, Link, MatmulPoint, Rate
from elbowroom.core.errors import InputError
from elbowroom.core.units import parse_bytes

DEVICES = (
    *("h100", "h100-pcie", "h100-nvl", "h200", "h20", "b200", "gb200", "gh200"),
    *("a100-80", "a100-80-pcie", "a100-40", "a100-40-pcie", "l40s", "l4", "a10"),
    *("rtx-pro-6000", "rtx5090", "rtx4090", "rtx3090", "mi300x"),
)
"""Devices of the presets; ``clusters`` has a file of each, which describes one whole node."""

PRESET_NAMES = "DEVICE-N, or DEVICE-MxN for M nodes of N devices, such as h200-8 and h100-2x8"

_PRESET = re.compile(r"(?P<device>.+)-((?P<nodes>\d{1,5})x)?(?P<devices>\d{1,5})")


def is_preset(name: str) -> bool:
    match = _PRESET.fullmatch(name)
    return match is not None and match["device"] in DEVICES


def read_cluster(name: str | Path) -> Cluster:
    """Read a cluster: a preset by its name, or a TOML file.

    A preset is ``DEVICE-N``, N devices in one node, or ``DEVICE-MxN``, M such nodes. Raises
    InputError when there is neither, or when a number is missing or impossible.
    """
    match = _PRESET.fullmatch(str(name))
    if match and match["device"] in DEVICES:
        node = _parse_text(name, _preset_file(match["device"]).read_text(encoding="utf-8"))
        return node.of_nodes(str(name), int(match["nodes"] or 1), int(match["devices"]))
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"no cluster '{name}'{_nearest(str(name))}: give {PRESET_NAMES}, with one of "
            f"{', '.join(DEVICES)}; or a file such as `elbowroom profile` writes ({error})"
        ) from error
    return _parse_text(name, text)


def _preset_file(device: str) -> Traversable:
    return resources.files("elbowroom.core") / "clusters" / f"{device}.toml"


def _nearest(name: str) -> str:
    """A question for the preset that was perhaps meant, or nothing."""
    match = None if name.lower() in DEVICES else _PRESET.fullmatch(name)
    device, count = (match["device"], name[match.end("device") :]) if match else (name, "-1")
    device = device.lower()
    found = [each for each in DEVICES if each.startswith(device)]
    found += get_close_matches(device, DEVICES, 1)
    return f", perhaps {found[0]}{count}" if found else ""


def _parse_text(name: str | Path, text: str) -> Cluster:
    """Parse TOML text. Raises InputError with what is wrong."""
    try:
        return parse_cluster(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"cluster {name} is not valid TOML: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"cluster {name}: {_what_is_wrong(error)}") from error


def parse_cluster(data: dict[str, Any]) -> Cluster:
    """Build a cluster from parsed TOML. Raises KeyError, TypeError or ValueError."""
    device = data["device"]
    _check_keys(data, _CLUSTER_KEYS, "a cluster")
    _check_keys(device, _DEVICE_KEYS, "[device]")
    for link in data.get("links", ()):
        _check_keys(link, _LINK_KEYS, "[[links]]")
    flops = _rate(device, "flops")
    bandwidth = _rate(device, "memory_bandwidth")
    memory = device["memory"]
    return Cluster(
        name=str(data["name"]),
        num_devices=int(_positive(data, "num_devices")),
        device=Device(
            name=str(device["name"]),
            memory_bytes=parse_bytes(memory) if isinstance(memory, str) else int(memory),
            memory_fraction=_fraction(device, "memory_fraction", 0.9),
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
                mesh=bool(link.get("mesh", False)),
                network=bool(link.get("network", level > 0)),
            )
            for level, link in enumerate(
                sorted(data.get("links", ()), key=lambda link: link["num_devices"])
            )
        ),
        uncertainty=_positive(data, "uncertainty", 0.35),
        sources={str(key): str(value) for key, value in data.get("sources", {}).items()},
    )


_CLUSTER_KEYS = ("name", "num_devices", "device", "links", "uncertainty", "sources")
_DEVICE_KEYS = tuple(f.name.removesuffix("_bytes") for f in fields(Device))
_LINK_KEYS = tuple(f.name for f in fields(Link))


def _check_keys(table: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"'{key}' is no key of {where}: it has {', '.join(known)}")


def _fraction(table: dict[str, Any], key: str, default: float) -> float:
    value = _positive(table, key, default)
    if value > 1:
        raise ValueError(f"'{key}' must be a fraction of at most 1, not {value:g}")
    return value


def _rate(table: dict[str, Any], key: str, default: Rate | None = None) -> Rate:
    """The rate under ``key``: a number, or a table with ``peak`` and ``fraction``."""
    value = table[key] if default is None else table.get(key, default)
    if isinstance(value, Rate):
        return value
    if isinstance(value, dict):
        return Rate(_positive(value, "peak"), _fraction(value, "fraction", 1.0))
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
