"""Sizes: what is read, what is refused, what is printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.core.units import (
    GIB,
    KIB,
    MIB,
    format_bandwidth,
    format_bytes,
    format_count,
    format_flops,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_latency,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000000", 1_000_000),
        ("0", 0),
        ("7b", 7),
        ("2GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("1.5KiB", 1536),
        ("141GB", 141 * 10**9),
        ("1TB", 10**12),
        ("1TiB", 1024**4),
    ],
)
def test_reads_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1 2", "1XB", "1,5GiB", "1.GiB", "nan", "inf", "1e9", "0x10"]
)
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="write for example 2GiB"):
        parse_bytes(text)


def test_refuses_a_number_beyond_floats() -> None:
    with pytest.raises(InputError):
        parse_bytes("9" * 400)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (1536 * KIB, "1.5 MiB"),
        (2 * GIB, "2 GiB"),
        (-2 * GIB, "-2 GiB"),
        (20_000 * GIB, "20000 GiB"),
    ],
)
def test_prints_sizes(num_bytes: int, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


@given(st.integers(0, 2**53))
def test_a_plain_number_is_read_exactly(num_bytes: int) -> None:
    assert parse_bytes(str(num_bytes)) == num_bytes


@given(st.integers(0, 2**43))
def test_what_is_printed_can_be_read_back_nearly(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "bytes_per_second", "shown"),
    [
        ("10Gbit/s", 1.25e9, "10 Gbit/s"),
        (" 100 Mbit/s", 1.25e7, "100 Mbit/s"),
        ("1.25GB/s", 1.25e9, "10 Gbit/s"),
        ("8KiB/s", 8192, "65.54 kbit/s"),
        ("16bit/s", 2, "16 bit/s"),
    ],
)
def test_bandwidths(text: str, bytes_per_second: float, shown: str) -> None:
    assert parse_bandwidth(text) == bytes_per_second
    assert format_bandwidth(bytes_per_second) == shown


@pytest.mark.parametrize(
    "text", ["", "10", "10Gbit", "0Gbit/s", "-1Gbit/s", "1Gbyte/s", "1/s", "nanB/s"]
)
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(InputError, match="write for example 10Gbit/s"):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("2us", 2e-6), ("0.5ms", 5e-4), ("1 s", 1), ("0s", 0), ("700ns", 7e-7)]
)
def test_latencies(text: str, expected: float) -> None:
    assert parse_latency(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("text", ["", "2", "us", "-2us", "2m", "2h", "nans", "1e3us"])
def test_what_is_no_latency(text: str) -> None:
    with pytest.raises(InputError, match="write for example 2us"):
        parse_latency(text)


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("2.9TFLOP/s", 2.9e12, "2.9 TFLOP/s"),
        ("500 gflops", 5e11, "500 GFLOP/s"),
        ("2.9T", 2.9e12, "2.9 TFLOP/s"),
        ("1000", 1000, "1000 FLOP/s"),
    ],
)
def test_rates_of_work(text: str, expected: float, shown: str) -> None:
    assert parse_flops(text) == pytest.approx(expected, rel=1e-12)
    assert format_flops(expected) == shown


@pytest.mark.parametrize("text", ["", "T", "0", "-1T", "2TB/s", "inf", "2.9e12"])
def test_what_is_no_rate_of_work(text: str) -> None:
    with pytest.raises(InputError, match=r"write for example 2\.9TFLOP/s"):
        parse_flops(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (1_536_000, "1.536M"),
        (30_532_122_624, "30.53B"),
        (671_026_404_352, "671B"),
        (1_026_408_232_448, "1.026T"),
    ],
)
def test_counts_are_written_as_models_are_named(number: int, text: str) -> None:
    assert format_count(number) == text
