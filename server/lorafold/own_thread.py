"""Runs a function in a thread that ends with it, so that only the engine's thread keeps a team of compute threads.

OpenMP, as torch brings it along (libgomp), gives every thread that ever computed a team of workers, which lives as long
as that thread. Once there are more workers than cores, waiting ones no longer spin but sleep (`gomp_managed_threads`
and `gomp_throttled_spin_count_var` in libgomp's wait.h), and each of the hundreds of operations of a decode step waits
until the system wakes them: on two cores a step of 20 ms took 31 as long as one idle thread had a team too.

Work that no request waits for steps back behind decoding (`in_background`): under constant hot swaps a small model kept
0.92 of its throughput on two cores, and 0.72 without (`bench.swap_under_load`).
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


NICENESS = 19
"""Of background work: a tenth of the share of others, so that it still gets on where all cores are busy."""


async def in_own_thread(function: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> T:
    """As `asyncio.to_thread`, whose threads stay. Raises what the function raises."""
    return await run_in(ThreadPoolExecutor(1), partial(function, *args, **keywords))


async def in_background(function: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> T:
    """The same, behind everything else that wants a processor now."""
    return await run_in(ThreadPoolExecutor(1, initializer=step_back), partial(function, *args, **keywords))


async def run_in(pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    """Runs one function in a pool, which ends with it."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(copy_context().run, function))
    finally:
        pool.shutdown(wait=False)


def step_back() -> None:
    """Lowers the priority of this thread; only Linux has one for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + NICENESS)
