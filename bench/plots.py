"""Draws the pictures of bench/results from the result files there, and from nothing else.

    python -m bench.plots

For each picture the newest file that has what it shows counts. One SVG and one PNG each, transparent, in colours that
can be read on white and on black.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rounds import RESULTS
from lorafold_adapters.gate import MAX_DELTA_ERROR

GREY = "#848d97"
COLOURS = ("#3b82f6", "#d97706", "#16a34a", "#8b5cf6", "#ef4444")
"""Each at least three times as bright as black, or white as bright as it (WCAG 1.4.11)."""
STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "lorafold",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("grid.color", "legend.labelcolor"), GREY),
}
Result = dict[str, Any]


def newest(theme: str, folder: Path = RESULTS, wanted: Callable[[Result], bool] = lambda _: True) -> list[Result]:
    """The lines of the newest file of a theme whose result is `wanted`, the result first; quick runs count not.

    Raises FileNotFoundError.
    """
    named = re.compile(rf"{theme}_[a-z0-9-]+_(\d{{4}}-\d\d-\d\d)(?:_(\d+))?\.jsonl")
    files = sorted(
        (found[1], int(found[2] or 1), file) for file in folder.iterdir() if (found := named.fullmatch(file.name))
    )
    for *_, file in reversed(files):
        lines: list[Result] = [json.loads(line) for line in file.read_text().splitlines()]
        if "--quick" not in lines[0]["command"] and wanted(lines[0]):
            return lines
    raise FileNotFoundError(f"no result of bench.{theme} in {folder}: run it with --record")


def drawn_cells(result: Result, dtype: str) -> list[Result]:
    """Those of one dtype, with adapters on all linear layers."""
    return [cell for cell in result["cells"] if (cell["dtype"], cell["targets"]) == (dtype, "all")]


def several_ranks(result: Result, dtype: str) -> bool:
    """True if there is something to draw in that dtype."""
    return len({cell["rank"] for cell in drawn_cells(result, dtype)}) > 1


def overhead(lines: Sequence[Result], dtype: str) -> Figure:
    """Against rank for one adapter, and against batch for several; with the limit, and PEFT's."""
    result = lines[0]
    cells = drawn_cells(result, dtype)
    figure, (left, right) = panels(result, f"a decode step unmerged, over merged; {dtype}, all linear layers")
    for colour, batch in zip(COLOURS, sorted({cell["batch"] for cell in cells}), strict=False):
        own = [cell for cell in cells if (cell["batch"], cell["adapters"]) == (batch, 1)]
        curves(left, own, "rank", colour, f"{batch} row{'s' * (batch > 1)}")
    for colour, adapters in zip(COLOURS, sorted({cell["adapters"] for cell in cells}), strict=False):
        own = [cell for cell in cells if (cell["rank"], cell["adapters"]) == (16, adapters)]
        curves(right, own, "batch", colour, f"{adapters} adapter{'s' * (adapters > 1)}")
    left.set(xlabel="rank, 1 adapter", ylabel="unmerged over merged")
    right.set(xlabel="rows, rank 16")
    for axes, name in ((left, "rank"), (right, "batch")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({cell[name] for cell in cells}), map(str, sorted({cell[name] for cell in cells})))
        axes.minorticks_off()
        for style, label in (("--", "PEFT"), (":", "limit")):
            axes.plot([], [], style, color=GREY, label=label)
        axes.legend(fontsize=8)
    return figure


def curves(axes: Axes, cells: Sequence[Result], by: str, colour: str, label: str) -> None:
    """Ours with its intervals, PEFT's, and the limit."""
    cells = sorted(cells, key=lambda cell: int(cell[by]))
    x = [cell[by] for cell in cells]
    ours = [cell["unmerged_over_merged"] for cell in cells]
    axes.plot(x, [each["median"] for each in ours], "o-", color=colour, label=label, markersize=4)
    axes.fill_between(x, [each["low"] for each in ours], [each["high"] for each in ours], color=colour, alpha=0.2)
    peft = [cell["peft_unmerged_over_merged"]["median"] for cell in cells]
    axes.plot(x, peft, "--", color=colour, linewidth=1)
    axes.plot(x, [cell["limit"] for cell in cells], ":", color=colour, linewidth=1.2)


def swap(lines: Sequence[Result]) -> Figure:
    """Swapping and unfolding by kind of undo, and PEFT's, over a plain copy of the same weights."""
    result = lines[0]
    figure, plots = panels(result, "replacing a folded adapter, over a copy of the weights that it changes")
    for axes, (dtype, kinds) in zip(plots, result["all"].items(), strict=True):
        labels = [*kinds, "PEFT"]
        last = next(reversed(kinds.values()))
        for offset, name, colour in ((-0.2, "swap_over_floor", COLOURS[0]), (0.2, "unmerge_over_floor", COLOURS[2])):
            places = [place + offset for place in range(len(kinds))]
            bars(axes, places, list(kinds.values()), name, colour, name.removesuffix("_over_floor"))
        bars(axes, [len(kinds)], [last], "peft_over_floor", COLOURS[1], "PEFT: unmerge, merge")
        axes.axhline(1, color=GREY, linestyle=":", label="floor: copy_")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel(f"undo, {dtype}")
        axes.legend(fontsize=8)
    plots[0].set_ylabel("times the floor")
    return figure


def bars(axes: Axes, places: Sequence[float], found: Sequence[Result], name: str, colour: str, label: str) -> None:
    """Medians with quartiles."""
    heights = [each[name] for each in found]
    low = [max(0.0, each[name] - each["quartiles"][name][0]) for each in found]
    high = [max(0.0, each["quartiles"][name][1] - each[name]) for each in found]
    axes.bar(places, heights, 0.38, color=colour, alpha=0.85, label=label, yerr=[low, high], ecolor=GREY)


def fidelity(lines: Sequence[Result]) -> Figure:
    """What gets lost, and what that does to accuracy, against the size of the delta."""
    sizes = [point for point in lines[1:] if point["part"] == "sizes"]
    figure, (left, right) = panels(lines[0], "adapters of the demo set, made weaker, folded")
    for colour, dtype in zip(COLOURS, dict.fromkeys(point["dtype"] for point in sizes), strict=False):
        for task in dict.fromkeys(point["task"] for point in sizes):
            for mode, style in (("merged", "o-"), ("unmerged", "--")):
                own = [each for each in sizes if (each["dtype"], each["task"], each["mode"]) == (dtype, task, mode)]
                own.sort(key=lambda each: float(each["delta_over_weight"]))
                x = [each["delta_over_weight"] for each in own]
                named = {"label": f"{dtype}, {mode}"} if task == sizes[0]["task"] else {}
                options: Result = {"color": colour, "markersize": 3, "linewidth": 1.2, **named}
                left.plot(x, [each["delta_error"] or math.nan for each in own], style, **options)
                right.plot(x, [each["accuracy"] for each in own], style, **options)
    right.plot([], [], ":", color=GREY, label="max_delta_error")
    left.axhline(MAX_DELTA_ERROR, color=GREY, linestyle=":")
    left.set(xlabel="rms(delta) / rms(weight)", ylabel="error of the delta that arrives", xscale="log", yscale="log")
    right.set(xlabel="rms(delta) / rms(weight)", ylabel="accuracy of what arrives", xscale="log")
    right.legend(fontsize=7, loc="lower right")
    return figure


def panels(result: Result, title: str) -> tuple[Figure, Sequence[Axes]]:
    """Two plots side by side, and above them what was measured on what."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    versions = result["versions"]
    on = f"{result['hardware']}, torch {versions['torch']}, PEFT {versions['peft']}, {result['commit']}"
    measured = f"{result['command']}; {on}"
    figure.set_label(measured)
    figure.suptitle(f"{title}\n", fontsize=11)
    figure.text(0.5, 0.9, measured, ha="center", fontsize=7.5)
    return figure, figure.subplots(1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """How a picture is made."""

    theme: str
    """Of its result file."""
    draw: Callable[[Sequence[Result]], Figure]
    """From the lines of the file."""
    wanted: Callable[[Result], bool] = lambda _: True
    """Whether a result has what it shows."""


def overhead_in(dtype: str) -> Picture:
    """What the unmerged path costs in one dtype."""
    return Picture(theme="overhead", draw=partial(overhead, dtype=dtype), wanted=partial(several_ranks, dtype=dtype))


PICTURES = {
    "overhead": overhead_in("float32"),
    "overhead_bf16": overhead_in("bfloat16"),
    "swap": Picture(theme="swap", draw=swap),
    "fidelity": Picture(theme="fidelity", draw=fidelity),
}
"""By the name of their files."""


def draw(results: Path, folder: Path) -> list[Path]:
    """Draws everything; the files."""
    files = []
    with mpl.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture.draw(newest(picture.theme, results, picture.wanted))
            for file in (folder / f"{name}.svg", folder / f"{name}.png"):
                metadata = {"Date": None, "Description": figure.get_label()} if file.suffix == ".svg" else {}
                figure.savefig(file, transparent=True, dpi=160, metadata=metadata)
                files.append(file)
    return files


def main() -> None:
    """Draws."""
    for file in draw(RESULTS, RESULTS):
        print(file)


if __name__ == "__main__":
    main()
