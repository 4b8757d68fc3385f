"""Runs a function in a thread that ends with it, so that only the engine's thread keeps a team of compute threads.

OpenMP, as torch brings it along (libgomp), gives every thread that ever computed a team of workers, which lives as long
as that thread. Once there are more workers than cores, waiting ones no longer spin but sleep (`gomp_managed_threads`
and `gomp_throttled_spin_count_var` in libgomp's wait.h), and each of the hundreds of operations of a decode step waits
until the system wakes them: on two cores a step of 20 ms took 31 as long as one idle thread had a team too.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_own_thread(function: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> T:
    """As `asyncio.to_thread`, whose threads stay. Raises what the function raises."""
    pool = ThreadPoolExecutor(1)
    work = partial(copy_context().run, function, *args, **keywords)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)
