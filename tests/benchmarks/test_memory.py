"""Memory by phase: a mapped file and allocated memory are told apart, and a phase's peak is its own."""

from __future__ import annotations

import mmap
import multiprocessing
import sys

import numpy as np
import pytest

from edgekd.benchmarks import memory

MB = 10**6
SIZE = 200 * MB
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's counters")


def _in_fresh_process(function, *args):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _map(path):
    before = memory.usage()
    memory.begin_phase()
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        sum(mapped[::4096])
        return before, memory.end_phase()


def _allocate():
    before = memory.usage()
    memory.begin_phase()
    held = np.ones(SIZE, np.uint8)
    phase = memory.end_phase()
    assert held[0]
    return before, phase


def test_a_mapped_file_and_allocated_memory_are_told_apart(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * SIZE)
    before, phase = _in_fresh_process(_map, path)
    assert phase.end.file_backed - before.file_backed == pytest.approx(SIZE, rel=0.05)
    assert phase.end.anonymous - before.anonymous < 0.05 * SIZE
    before, phase = _in_fresh_process(_allocate)
    assert phase.end.anonymous - before.anonymous == pytest.approx(SIZE, rel=0.05)
    assert phase.end.file_backed - before.file_backed < 0.05 * SIZE
    assert phase.peak_rss >= before.rss + 0.95 * SIZE


def _peaks():
    memory.begin_phase()
    held = np.ones(SIZE, np.uint8)
    first = memory.end_phase()
    del held
    memory.begin_phase()
    small = np.ones(SIZE // 10, np.uint8)
    second = memory.end_phase()
    assert small[0]
    return first, second


def test_a_peak_is_that_of_its_own_phase():
    first, second = _in_fresh_process(_peaks)
    assert first.peak_rss - second.peak_rss == pytest.approx(0.9 * SIZE, rel=0.1)


def _faults(path):
    import resource

    before, read = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, memory.disk_read_bytes()
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        sum(mapped[::4096])
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before, memory.disk_read_bytes() - read


def test_what_was_dropped_from_the_page_cache_comes_from_the_disk_again(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * (20 * MB))
    warm_faults, warm_read = _in_fresh_process(_faults, path)
    assert memory.drop_from_page_cache([path])
    cold_faults, cold_read = _in_fresh_process(_faults, path)
    if cold_read == 0:
        pytest.skip("the folder for temporary files is not on a disk")
    assert warm_faults == 0 and warm_read < MB
    assert cold_faults > 0 and cold_read >= 19 * MB


def test_a_system_that_does_not_tell(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        memory.usage("self", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps_rollup").write_text(
        "55-7f ---p 0 00:00 0 [rollup]\nRss: 1000 kB\nPss: 600 kB\nAnonymous: 300 kB\nSwap: 20 kB\n"
    )
    found = memory.usage(7, tmp_path)
    assert found == memory.Usage(1024000, 307200, 716800, 20480, 614400)
