"""The charts' drawing: what is kept of many points, and that the drawing can stand in a page."""

import re
import warnings
import xml.etree.ElementTree as ET

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.reporting.curves import POINTS, Curve, draw, smoothed, thin

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


@settings(deadline=None)
@given(values, st.integers(6, 50))
def test_thinned_points_are_points_of_the_curve_with_its_ends_and_extremes(heights, most):
    points = pd.Series(heights)
    kept = thin(points, most)
    assert len(kept) <= most
    assert kept.equals(points[kept.index])
    assert kept.index.is_monotonic_increasing
    assert (kept.index[0], kept.index[-1]) == (0, len(heights) - 1)
    assert (kept.min(), kept.max()) == (min(heights), max(heights))


def test_a_short_curve_is_not_thinned():
    points = pd.Series(range(POINTS)) % 7
    assert thin(points).equals(points)


def test_smoothing_by_hand():
    assert smoothed(pd.Series({1: 3.0, 2: 6.0, 5: 0.0})).to_dict() == {1: 3.0, 2: 3.0, 5: 0.0}
    assert (smoothed(pd.Series([2.0] * 200)) == 2.0).all()


@settings(deadline=None)
@given(values)
def test_smoothed_values_stay_within_those_around_them(heights):
    result = smoothed(pd.Series(heights))
    assert list(result.index) == list(range(len(heights)))
    margin = 1e-6 * (1 + max(map(abs, heights)))
    assert result.between(min(heights) - margin, max(heights) + margin).all()


def curve(name: str, color: int, *points: tuple[int, float], best: tuple[int, float] | None = None) -> Curve:
    return Curve(name, color, pd.Series(dict(points)), best)


def parts(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def test_one_step_is_a_dot_and_runs_have_the_pages_colours():
    svg = draw("Loss", "per token", [curve("a", 0, (1, 2.0)), curve("_b", 9, (1, 3.0), (2, 1.0))], noisy=True)
    root = parts(svg)
    texts = [element.text for element in root.iter("text")]
    assert {"Loss", "per token", "step", "\u200ba", "\u200b_b"} <= set(texts)
    assert set(re.findall(r"var\(--[\w-]+\)", svg)) == {"var(--ink)", "var(--grid)", "var(--run-0)", "var(--run-1)"}
    assert re.search(r"stroke: var\(--run-1\).*?stroke-dasharray|stroke-dasharray[^\"]*?; stroke: var\(--run-1\)", svg)
    assert "#0101" not in svg
    assert [element for element in root.iter() if element.tag in ("metadata", "style", "script", "image")] == []


def test_two_charts_share_no_id_and_every_reference_leads_somewhere():
    curves = [curve("a", 0, (1, 2.0), (2, 1.0))]
    ids = []
    for title in ("Loss", "Norm"):
        svg = draw(title, "", curves, noisy=False)
        own = re.findall(r' id="([^"]+)"', svg)
        used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
        assert {a or b for a, b in used} == set(own)
        ids += own
    assert len(ids) == len(set(ids)) > 0


def test_the_same_values_give_the_same_bytes():
    curves = [curve("a", 0, *((i, 1 / (i + 1)) for i in range(100)), best=(5, 1 / 6))]
    assert draw("Loss", "", curves, noisy=True) == draw("Loss", "", curves, noisy=True)


def test_the_best_point_is_marked_and_named():
    svg = draw("Loss", "", [curve("a", 0, (1, 2.0), (2, 1.0), best=(2, 1.0))], noisy=False)
    assert "\u200ba, best" in [element.text for element in parts(svg).iter("text")]


def test_wide_spans_are_logarithmic_and_narrow_ones_are_not():
    def labels(low: float, noisy: bool) -> list[float]:
        svg = draw("Loss", "", [curve("a", 0, (1, 10.0), (2, low))], noisy=noisy)
        left = [e for e in parts(svg).iter("text") if "text-anchor: end" in (e.get("style") or "")]
        return [float((e.text or "").replace("\u2212", "-")) for e in left]

    wide = labels(0.01, True)
    assert max(wide) / min(wide) >= 1000
    assert min(labels(0.01, False)) == 0
    assert min(labels(2.0, True)) >= 1


def test_a_runs_name_is_shown_letter_for_letter():
    """Also one that looks like what the drawing is made fit for a page by, or that the drawing's font has not."""
    name = '#010203 #010110 id="x" url(#y) xlink:href="#z" <script>&amp; $x^2$ 中文'
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user would see it on standard error
        svg = draw("Loss", "", [curve(name, 0, (1, 2.0)), curve("b", 1, (1, 2.0))], noisy=False)
    assert f"\u200b{name}" in [element.text for element in parts(svg).iter("text")]


def test_equal_curves_are_all_seen():
    """Two backends draw the same line: the one below is wider."""
    equal = [(1, 2.0), (2, 1.0), (3, 1.5)]
    svg = draw("Loss", "", [curve("a", 0, *equal), curve("b", 1, *equal)], noisy=False)
    width = {
        name: max(map(float, re.findall(rf"stroke: var\(--run-{color}\); stroke-width: ([\d.]+)", svg)))
        for color, name in enumerate("ab")
    }
    assert width["a"] > width["b"]
