"""A headless Chromium: what a page is once its script has run."""

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")


def chromium(url: str, *flags: str, milliseconds: int = 6000) -> str:
    """The document after so many milliseconds of the page's own time. Skips the test where there is no Chromium."""
    program = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if program is None:
        pytest.skip("Chromium is not installed")
    done = subprocess.run(
        [program, *FLAGS, *flags, f"--virtual-time-budget={milliseconds}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def screenshot(url: str, file: Path, *, width: int, height: int, dark: bool = False) -> None:
    """The page as a PNG."""
    flags = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(url, f"--screenshot={file}", f"--window-size={width},{height}", *flags)
