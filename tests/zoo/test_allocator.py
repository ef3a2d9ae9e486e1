"""Freed memory stays with the process, seen from a process of its own."""

import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource
from dimmix.allocator import keep_freed_memory
kept = keep_freed_memory()
def faults_of_a_large_buffer():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (100 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_a_large_buffer()
print(kept, faults_of_a_large_buffer())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_large_buffer_is_paged_in_once():
    kept, faults = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    ).stdout.split()
    assert kept == "True"
    assert int(faults) < 100  # 25,600 pages of 4 KiB if it had been given back
