"""Memory that is freed stays with the process while it is asked to, and no longer."""

import os
import platform
import subprocess
import sys

import pytest

# what the process holds beyond its begin, in MiB, when 8 tensors of 32 MiB were made and freed: while it is open, and
# after; and how many pages the system had to map for the same tensors once more
PROGRAM = """
import resource, torch
from antlm_fast.training.freed_memory import freed_memory_is_kept

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**23) for _ in range(8)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

use()
begin = held()
try:
    with freed_memory_is_kept():
        for _ in range(4):
            use()
        print(held() - begin, use())
        raise KeyError
except KeyError:
    print(held() - begin)
"""
USED_MIB = 8 * 32
PAGES = 8 * 2**25 // 2**21  # at least, where the system's pages are huge


def run(**environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_it_stays_while_it_is_open():
    held, pages, held_after = run()
    assert held >= USED_MIB
    assert pages < PAGES / 2
    assert held_after < USED_MIB / 4


def test_what_the_environment_says_goes_before():
    held, pages, _ = run(MALLOC_TOP_PAD_="131072")
    assert held < USED_MIB / 4
    assert pages >= PAGES
