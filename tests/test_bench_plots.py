"""The pictures: drawn from the result files alone, and readable on white and on black."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.plots import COLOURS, GREY, PICTURES, draw, newest
from bench.rounds import RESULTS

ON = ("#ffffff", "#0d1117")
"""Pages, by day and by night."""


def luminance(colour: str) -> float:
    """Of sRGB (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Of two colours (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [GREY, *COLOURS])
@pytest.mark.parametrize("page", ON)
def test_colours_can_be_read_by_day_and_by_night(colour: str, page: str) -> None:
    assert contrast(colour, page) >= 3


def test_a_colour_that_could_not_be_read_would_be_found() -> None:
    assert contrast("#f59e0b", "#ffffff") < 3


def test_the_pictures_in_the_repository_are_those_of_its_newest_results(tmp_path: Path) -> None:
    drawn = {file.name: file for file in draw(RESULTS, tmp_path)}
    assert set(drawn) == {f"{name}.{kind}" for name in PICTURES for kind in ("svg", "png")}
    for name, file in drawn.items():
        kept = RESULTS / name
        assert kept.stat().st_size > 10_000, "a picture with nothing in it"
        if file.suffix == ".svg":
            texts = [ElementTree.parse(each).getroot().attrib["viewBox"] for each in (file, kept)]
            assert texts[0] == texts[1]
            assert result_of(kept) == result_of(file), f"{name} is not of the newest result: python -m bench.plots"


def result_of(picture: Path) -> str:
    """What a picture says that it was drawn from."""
    root = ElementTree.parse(picture).getroot()
    return next(each.text or "" for each in root.iter() if each.tag.endswith("description"))


def test_the_newest_result_is_taken_and_one_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--record"):
        newest("overhead", tmp_path)
    for name, command in (
        ("x_2026-01-01", "a"),
        ("x_2026-01-02", "b"),
        ("x-2_2026-01-02_2", "c"),
        ("y_2026-01-01", "d"),
    ):
        write(tmp_path / f"overhead_{name}.jsonl", command)
    assert newest("overhead", tmp_path)[0]["command"] == "c"
    write(tmp_path / "overhead_x_2026-01-03.jsonl", "e --quick")
    assert newest("overhead", tmp_path)[0]["command"] == "c"
    write(tmp_path / "swap_under_load_x_2026-01-02.jsonl", "f")
    with pytest.raises(FileNotFoundError):
        newest("swap", tmp_path)


def test_a_result_without_what_a_picture_shows_is_passed_over() -> None:
    one = {"dtype": "float32", "targets": "all", "rank": 16}
    many = {"cells": [one, {**one, "rank": 64}]}
    assert PICTURES["overhead"].wanted(many)
    assert not PICTURES["overhead_bf16"].wanted(many)
    assert not PICTURES["overhead"].wanted({"cells": [one]})
    assert not PICTURES["overhead"].wanted({"cells": [{**cell, "targets": "qv"} for cell in many["cells"]]})


def test_older_results_are_taken_if_newer_ones_have_nothing_to_show(tmp_path: Path) -> None:
    write(tmp_path / "overhead_x_2026-01-01.jsonl", "a")
    write(tmp_path / "overhead_x_2026-01-02.jsonl", "b")
    assert newest("overhead", tmp_path, lambda result: result["command"] == "a")[0]["command"] == "a"


def write(file: Path, command: str) -> None:
    """A result."""
    file.write_text(json.dumps({"command": command}) + "\n{}\n")
