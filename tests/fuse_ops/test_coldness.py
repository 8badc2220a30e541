"""What counts as coming from the disk."""

from __future__ import annotations

from unionfs.fuse_ops.speedups.reading_ahead import CacheMisses


def test_one_slow_read_is_an_accident() -> None:
    coldness = CacheMisses()
    coldness.record_latency(1.0, 0.1)
    assert not coldness.is_cold
    coldness.record_latency(1.0, 0.1)
    assert coldness.is_cold


def test_fast_reads_end_it_slowly() -> None:
    coldness = CacheMisses()
    for _ in range(100):
        coldness.record_latency(1.0, 0.1)
    fast = 0
    while coldness.is_cold:
        coldness.record_latency(0.1, 0.1)
        fast += 1
    assert 10 < fast < 100
    coldness.record_latency(1.0, 0.1)
    assert coldness.is_cold


def test_what_is_in_memory_never_counts() -> None:
    coldness = CacheMisses()
    for _ in range(1000):
        coldness.record_latency(0.05, 0.1)
    assert not coldness.is_cold
