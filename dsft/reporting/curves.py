"""Curves of several runs as an <svg> element that follows the page's light or dark colours."""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

# Distinct for most colour-blind readers, on white and on near black; beyond eight runs the dashes differ.
RUN_COLORS = [
    {"light": "#0063b1", "dark": "#58a6ff"},
    {"light": "#c44e00", "dark": "#ff9d4d"},
    {"light": "#00795c", "dark": "#3fcf9f"},
    {"light": "#a3208f", "dark": "#f27fdd"},
    {"light": "#7a6000", "dark": "#e0c341"},
    {"light": "#c1121f", "dark": "#ff7b7b"},
    {"light": "#4b4fcf", "dark": "#a5a8ff"},
    {"light": "#5c6570", "dark": "#b7c0ca"},
]
DASHES = ("-", "--", ":", "-.")
INK, GRID = "#010203", "#010204"  # placeholders of the page's CSS colours, which matplotlib cannot name
WIDER = 2.2  # points
POINTS = 1000  # of a line: as many as a screen has pixels for a chart
SMOOTHED = 50  # with this many points or more, a smoothed line is drawn over the pale values
LOGARITHMIC = 20  # values that span a larger factor are shown on a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """One run's values.

    name: in the legend
    color: which of RUN_COLORS
    points: finite values by step
    best: (step, value) to mark
    """

    name: str
    color: int
    points: "pd.Series[float]"
    best: tuple[int, float] | None = None


def draw(title: str, unit: str, curves: Sequence[Curve], *, noisy: bool) -> str:
    """One chart over steps.

    Args:
        title: of the chart; it also makes the ids in the SVG unique on a page.
        unit: of the vertical axis.
        curves: at least one, each with at least one point.
        noisy: smooth many values, and use a logarithmic axis for a wide span.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    key = hashlib.sha256(title.encode()).hexdigest()[:8]
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 10, "text.parse_math": False}
    settings |= {f"{what}.color": INK for what in ("text", "xtick", "ytick")}
    settings |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "path.simplify": False}
    with mpl.rc_context():
        mpl.rcdefaults()  # ignore the user's own settings
        mpl.rcParams.update(settings)
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for place, curve in enumerate(curves, start=1):
            _draw_curve(axes, curve, smooth=noisy, later=len(curves) - place)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        low, high = min(curve.points.min() for curve in curves), max(curve.points.max() for curve in curves)
        if noisy and low > 0 and high / low > LOGARITHMIC:
            axes.set_yscale("log")
            decades = math.log10(high / low)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=12))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(curves) > 1 or any(curve.best for curve in curves):
            axes.legend(loc="best", fontsize=9, frameon=False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():  # letters that matplotlib's font lacks; the page's fonts have them
            warnings.filterwarnings("ignore", "Glyph ", UserWarning)
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _embeddable(file.getvalue(), key)


def thin(points: "pd.Series[float]", most: int = POINTS) -> "pd.Series[float]":
    """At most `most` points that look the same: the lowest and the highest of each stretch, and both ends."""
    if len(points) <= most:
        return points
    stretches = points.groupby(np.arange(len(points)) * (most // 2 - 1) // len(points))
    kept = {points.index[0], points.index[-1], *stretches.idxmin(), *stretches.idxmax()}
    return points.loc[sorted(kept)]


def smoothed(points: "pd.Series[float]") -> "pd.Series[float]":
    """The mean around each value, of a twentieth of all at most; of fewer near the ends."""
    places = np.arange(len(points))
    half = np.minimum(max(1, len(points) // 40), np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], points.cumsum()])
    return pd.Series((sums[places + half + 1] - sums[places - half]) / (2 * half + 1), points.index)


def _draw_curve(axes: Any, curve: Curve, *, smooth: bool, later: int) -> None:
    """Wider if `later` curves are drawn over it: equal runs, such as on two backends, would hide each other."""
    wider = WIDER * min(later, 2)
    color = f"#0101{16 + curve.color % len(RUN_COLORS):02x}"
    dashes = DASHES[curve.color // len(RUN_COLORS) % len(DASHES)]
    name = f"\u200b{curve.name}"  # matplotlib leaves out names that begin with _
    marker = "o" if len(curve.points) <= 30 else None  # a few points alone make no line
    pale = smooth and len(curve.points) >= SMOOTHED
    if pale:
        axes.plot(thin(curve.points), color=color, alpha=0.3, linewidth=1)
    line = thin(smoothed(curve.points) if pale else curve.points)
    style: Any = {"color": color, "linewidth": 1.8 + wider, "marker": marker, "markersize": 4 + wider}
    axes.plot(line, dashes, label=name, **style)
    if curve.best is not None:
        axes.plot(*curve.best, "*", color=color, markeredgecolor=INK, markersize=13, label=f"{name}, best")


def _embeddable(svg: str, key: str) -> str:
    """The element alone, its colours those of the page, its ids unique there."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # CSS would apply to the whole page
    link = r'(url\(#|href="#)([\w.-]+)'

    def own(tag: re.Match[str]) -> str:
        text = tag[0].replace(INK, "var(--ink)").replace(GRID, "var(--grid)").replace("xlink:href", "href")
        text = re.sub(r"#0101([0-9a-f]{2})\b", lambda found: f"var(--run-{int(found[1], 16) - 16})", text)
        text = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", text)
        return re.sub(link, lambda found: f"{found[1]}{key}-{found[2]}", text)

    used = {name for _, name in re.findall(link, svg)}
    svg = re.sub(r"<[^<>]+>", own, svg)  # tags only: the text between them is a run's name
    # The page sets the size, and HTML needs no namespaces, which would look like links.
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
