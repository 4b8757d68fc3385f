"""Which decode steps `bench.overhead` compares. Plain data."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from bench.adapters import ALL_LINEAR
from bench.models import SHAPES

TARGETS = {"all": tuple(ALL_LINEAR), "qv": ("q_proj", "v_proj")}
"""Layers that adapters change, by the name on the command line."""
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Cells that need the same adapters on the same model."""

    dtype: str
    targets: str
    rank: int

    @property
    def tail(self) -> str:
        """What its cells' names end with: nothing for fp32 on all linear layers."""
        return ("" if self.targets == "all" else f"_{self.targets}") + ("" if self.dtype == "float32" else "_bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One decode step."""

    group: Group
    batch: int
    adapters: int
    """Distinct ones, which the rows take in turn."""

    @property
    def key(self) -> str:
        """Its name in results: `b8_r16`, `b8_r16_a8`, `b1_r64_qv_bf16`."""
        several = f"_a{self.adapters}" if self.adapters > 1 else ""
        return f"b{self.batch}_r{self.group.rank}{several}{self.group.tail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is measured, and for how long."""

    dtypes: tuple[str, ...] = DTYPES
    targets: tuple[str, ...] = tuple(TARGETS)
    ranks: tuple[int, ...] = (4, 8, 16, 64, 256)
    batches: tuple[int, ...] = (1, 8, 32, 64)
    adapters: tuple[int, ...] = (1, 8, 32)
    seconds: float = 5.0
    """For one cell, on average over those of a group; what is not known then stays as it is."""

    def groups(self) -> Iterator[Group]:
        """All combinations; the model stays as long as it can."""
        for dtype, targets, rank in itertools.product(self.dtypes, self.targets, self.ranks):
            yield Group(dtype=dtype, targets=targets, rank=rank)

    def cells(self, group: Group) -> Iterator[Cell]:
        """Those of a group: no batch has more adapters than rows."""
        for batch, adapters in itertools.product(self.batches, self.adapters):
            if adapters <= batch:
                yield Cell(group=group, batch=batch, adapters=adapters)


QUICK = Grid(dtypes=("float32",), targets=("all",), ranks=(16,), batches=(1, 8, 16), adapters=(1, 8), seconds=15.0)


def parsed(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rank 16, fp32, all linear layers: under two minutes")
    parser.add_argument("--dtypes", type=some_of(DTYPES), help=f"of {listed(DTYPES)}")
    parser.add_argument("--targets", type=some_of(TARGETS), help=f"of {listed(TARGETS)}")
    parser.add_argument("--ranks", type=numbers, help=listed(Grid().ranks))
    parser.add_argument("--batches", type=numbers, help=listed(Grid().batches))
    parser.add_argument("--adapters", type=numbers, help=f"distinct ones in a batch; {listed(Grid().adapters)}")
    parser.add_argument("--seconds", type=float, help="for one cell, on average")
    parser.add_argument("--shape", choices=[*SHAPES], help="8b on a GPU, short on a CPU, unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep every timing under bench/results/")
    arguments = parser.parse_args()
    if min(planned(arguments).adapters) > max(planned(arguments).batches):
        parser.error("no batch has as many rows as there are to be adapters: give larger --batches or fewer --adapters")
    return arguments


def planned(arguments: argparse.Namespace) -> Grid:
    """What the command line asks for; what it leaves open is as in a whole run, or as in a quick one."""
    usual = QUICK if arguments.quick else Grid()
    names = ("dtypes", "targets", "ranks", "batches", "adapters", "seconds")
    return replace(usual, **{name: value for name in names if (value := getattr(arguments, name)) is not None})


def some_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads `a,b`, of what is known."""

    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"there is no {', '.join(map(repr, unknown))}: use {listed(known)}")
        return found

    return words


def numbers(text: str) -> tuple[int, ...]:
    """Reads `1,8`."""
    found = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 1 on, such as 1,8")
    return found


def listed(values: Iterable[object]) -> str:
    """`1,8`, for help."""
    return ",".join(map(str, values))
