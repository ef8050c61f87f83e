"""A real browser without a window and without the network: what it draws, and what it has to complain about."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WHY_NONE = (
    "no browser: none of " + ", ".join(NAMES) + " is on PATH (Debian has the package chromium-headless-shell), and "
    "DSFT_BROWSER names no other of Chromium's family"
)


def find_browser() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("DSFT_BROWSER"), *NAMES]))), None)


@dataclass(frozen=True)
class Opened:
    """A page as the browser has shown it.

    pixels: uint8 [height, width, 3], red, green and blue
    console: the lines that it wrote, errors and all others
    """

    pixels: np.ndarray
    console: list[str]


def open_page(page: Path, folder: Path, *, dark: bool = False, width: int = 1000, height: int = 1000) -> Opened:
    """Open a file.

    Args:
        page: an HTML file.
        folder: for the browser's own files.
        dark: as a user has it who prefers dark pages.
        width: of the window, in pixels.
        height: of the window, in pixels.
    """
    browser = find_browser()
    assert browser is not None
    picture = folder / "page.png"
    picture.unlink(missing_ok=True)
    words = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb",
        "--disable-background-networking", "--proxy-server=127.0.0.1:1", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},{height}",
        f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert picture.is_file(), done.stderr
    console = re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr)
    return Opened(np.asarray(Image.open(picture).convert("RGB")), console)


def columns_of(color: str, pixels: np.ndarray) -> np.ndarray:
    """Which columns of pixels hold a colour such as #0063b1: bool [width]. Nearly the same counts as the same."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
    near = (np.abs(pixels.astype(int) - wanted) <= 8).all(axis=2)
    found: np.ndarray = near.any(axis=0)
    return found
