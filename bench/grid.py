"""Which decode steps `bench.overhead` compares. Plain data."""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.adapters import ALL_LINEAR

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
    parser.add_argument("--dtypes", help=f"of {','.join(DTYPES)}")
    parser.add_argument("--targets", help=f"of {','.join(TARGETS)}")
    parser.add_argument("--ranks", help=listed(Grid().ranks))
    parser.add_argument("--batches", help=listed(Grid().batches))
    parser.add_argument("--adapters", help=f"distinct ones in a batch; {listed(Grid().adapters)}")
    parser.add_argument("--seconds", type=float, help="for one cell, on average")
    parser.add_argument("--shape", help="8b on a GPU, short on a CPU, unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep every timing under bench/results/")
    return parser.parse_args()


def planned(arguments: argparse.Namespace) -> Grid:
    """What the command line asks for; what it leaves open is as in a whole run, or as in a quick one."""
    usual = QUICK if arguments.quick else Grid()
    return Grid(
        dtypes=words(arguments.dtypes, usual.dtypes),
        targets=words(arguments.targets, usual.targets),
        ranks=numbers(arguments.ranks, usual.ranks),
        batches=numbers(arguments.batches, usual.batches),
        adapters=numbers(arguments.adapters, usual.adapters),
        seconds=usual.seconds if arguments.seconds is None else arguments.seconds,
    )


def words(text: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """`a,b` as words."""
    return usual if text is None else tuple(text.split(","))


def numbers(text: str | None, usual: tuple[int, ...]) -> tuple[int, ...]:
    """`1,8` as numbers."""
    return usual if text is None else tuple(int(part) for part in text.split(","))


def listed(values: Iterable[object]) -> str:
    """`1,8`, for help."""
    return ",".join(map(str, values))
