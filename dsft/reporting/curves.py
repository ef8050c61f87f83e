"""Curves of several runs as an <svg> element that follows the page's light or dark colours."""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Told apart by most people who see few colours, on white as on near black; beyond eight runs the dashes differ.
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
INK, GRID = "#010203", "#010204"  # stand for the page's own colours, which the drawing library cannot name
WIDER = 2.2  # points
POINTS = 1000  # of a line; a chart of that many is as wide as a screen
SMOOTHED = 50  # from so many points on, a line of neighbours' means is drawn over the pale values
LOGARITHMIC = 20  # a wider span of values than this factor is shown on a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """One run's values.

    name: in the legend
    color: which of RUN_COLORS
    points: (step, value), by rising steps, finite
    best: a point to mark
    """

    name: str
    color: int
    points: Sequence[tuple[int, float]]
    best: tuple[int, float] | None = None


def draw(title: str, unit: str, curves: Sequence[Curve], *, noisy: bool) -> str:
    """One chart over steps.

    Args:
        title: what is shown; also makes the ids in the drawing unique on a page.
        unit: of the vertical axis.
        curves: one at least, each with one point at least.
        noisy: draw means over pale values where there are many, on a logarithmic axis where they span much.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    key = hashlib.sha256(title.encode()).hexdigest()[:8]
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 10, "text.parse_math": False}
    settings |= {f"{what}.color": INK for what in ("text", "xtick", "ytick")}
    settings |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "path.simplify": False}
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a user has made of them
        mpl.rcParams.update(settings)
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for place, curve in enumerate(curves, start=1):
            _draw_curve(axes, curve, smooth=noisy, later=len(curves) - place)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        values = [value for curve in curves for _, value in curve.points]
        if noisy and min(values) > 0 and max(values) / min(values) > LOGARITHMIC:
            axes.set_yscale("log")
            decades = math.log10(max(values) / min(values))
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
        with warnings.catch_warnings():  # letters that its own font lacks; the page's has them
            warnings.filterwarnings("ignore", "Glyph ", UserWarning)
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _embeddable(file.getvalue(), key)


def thin(points: Sequence[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """At most `most` points that look the same: of each stretch the lowest and the highest, and both ends."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value as the mean of those around it, a twentieth of all at most; nearer the ends of fewer."""
    reach = max(1, len(points) // 40)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    result = []
    for at, (step, _) in enumerate(points):
        half = min(reach, at, len(points) - 1 - at)
        result.append((step, (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)))
    return result


def _draw_curve(axes: Any, curve: Curve, *, smooth: bool, later: int) -> None:
    """Wider where others are drawn over it later: equal runs, such as on two backends, would hide each other."""
    wider = WIDER * min(later, 2)
    color = f"#0101{16 + curve.color % len(RUN_COLORS):02x}"
    dashes = DASHES[curve.color // len(RUN_COLORS) % len(DASHES)]
    name = f"\u200b{curve.name}"  # the library leaves names out that begin with _
    marker = "o" if len(curve.points) <= 30 else None  # few points, or one, would be no line
    pale = smooth and len(curve.points) >= SMOOTHED
    if pale:
        axes.plot(*zip(*thin(curve.points), strict=True), color=color, alpha=0.3, linewidth=1)
    line = thin(smoothed(curve.points) if pale else curve.points)
    style: Any = {"color": color, "linewidth": 1.8 + wider, "marker": marker, "markersize": 4 + wider}
    axes.plot(*zip(*line, strict=True), dashes, label=name, **style)
    if curve.best is not None:
        axes.plot(*curve.best, "*", color=color, markeredgecolor=INK, markersize=13, label=f"{name}, best")


def _embeddable(svg: str, key: str) -> str:
    """The element alone, its colours those of the page, its ids unique there."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # rules of style would be the whole page's
    link = r'(url\(#|href="#)([\w.-]+)'

    def own(tag: re.Match[str]) -> str:
        text = tag[0].replace(INK, "var(--ink)").replace(GRID, "var(--grid)").replace("xlink:href", "href")
        text = re.sub(r"#0101([0-9a-f]{2})\b", lambda found: f"var(--run-{int(found[1], 16) - 16})", text)
        text = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", text)
        return re.sub(link, lambda found: f"{found[1]}{key}-{found[2]}", text)

    used = {name for _, name in re.findall(link, svg)}
    svg = re.sub(r"<[^<>]+>", own, svg)  # tags alone: what stands between them is a run's name
    # The size is the page's business; the namespaces are names, but read like addresses, and HTML needs none.
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
