"""Colours of a report's page: told apart by all readers, with text that can be read on them, and there when forced."""

import math
from itertools import combinations

import numpy as np
import pytest
from report_browser import KINDS, luminance, numbers_in

pytest_plugins = ["report_fixtures"]

# What is left of linear light in full colour blindness, by Machado, Oliveira and Fernandes (2009), table of severity 1.
SIGHT = {
    "full": np.eye(3),
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(colour, sight):
    """CIELAB of an sRGB colour as it is seen."""
    parts = np.array(numbers_in(colour)[:3]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    x = XYZ @ np.clip(sight @ linear, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x * (29 / 6) ** 2 / 3 + 4 / 29)
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


def difference(first, second):
    """CIEDE2000, by Sharma, Wu and Dalal (2005)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    c = ((math.hypot(a1, b1) + math.hypot(a2, b2)) / 2) ** 7
    g = 1.5 - 0.5 * math.sqrt(c / (c + 25**7))
    c1, c2 = math.hypot(g * a1, b1), math.hypot(g * a2, b2)
    h1, h2 = (math.degrees(math.atan2(b, g * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180
    h, c, light = math.radians(h1 + turn / 2), (c1 + c2) / 2, ((l1 + l2) / 2 - 50) ** 2
    t = 1 - 0.17 * math.cos(h - math.pi / 6) + 0.24 * math.cos(2 * h)
    t += 0.32 * math.cos(3 * h + math.pi / 30) - 0.2 * math.cos(4 * h - math.radians(63))
    dl = (l2 - l1) / (1 + 0.015 * light / math.sqrt(20 + light))
    dc = (c2 - c1) / (1 + 0.045 * c)
    dh = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2)) / (1 + 0.015 * c * t)
    bend = math.radians(60 * math.exp(-(((math.degrees(h) % 360 - 275) / 25) ** 2)))
    r = -2 * math.sqrt(c**7 / (c**7 + 25**7)) * math.sin(bend)
    return math.sqrt(dl**2 + dc**2 + dh**2 + r * dc * dh)


@pytest.mark.parametrize(
    ("first", "second", "expected"),  # pairs 1, 7, 16, 17 and 25 of the paper's table 1
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ],
)
def test_the_measure_of_difference_is_that_of_the_paper(first, second, expected):
    assert difference(first, second) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_experts_are_told_apart_by_readers_who_see_fewer_colours(show, scheme):
    page, _, _ = show(scheme=scheme, blocks=1, modules=["mlp"], experts=24, samples=[])
    value = "name => getComputedStyle(document.documentElement).getPropertyValue(name)"
    colours = [page.evaluate(value, f"--e{e}") for e in range(24)]
    for sight, matrix in SIGHT.items():
        seen = [lab(colour, np.array(matrix)) for colour in colours[:16]]
        assert min(difference(*pair) for pair in combinations(seen[:8], 2)) > (18 if sight == "full" else 10)
        assert min(difference(*pair) for pair in combinations(seen, 2)) > (9 if sight == "full" else 5)
    ink = luminance(page.evaluate("getComputedStyle(document.body).color"))
    for colour in [*colours, page.evaluate(value, "--enone")]:
        low, high = sorted((ink, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_that_say_something_stay_when_the_system_forces_its_own(show, scheme):
    forced, _, _ = show(scheme=scheme, forced_colors="active", **KINDS["molora"])
    free, _, _ = show(scheme=scheme, **KINDS["molora"])
    assert forced.evaluate("matchMedia('(forced-colors: active)').matches")
    colour = "(all, name) => all.map(e => getComputedStyle(e)[name])"
    for what, name in (
        ("#layer-maps td", "backgroundColor"), ("#layer-maps th", "color"), ("#token-text .token", "backgroundColor"),
        ("#token-text .token", "color"), ("#token-legend i", "backgroundColor"), (".ramp", "backgroundImage"),
        ("g.line path", "stroke"),
    ):  # fmt: skip
        found = forced.locator(what).evaluate_all(colour, name)
        assert found == free.locator(what).evaluate_all(colour, name)
        assert len(found) > 2
    assert len(set(forced.locator("#layer-maps td").evaluate_all(colour, "backgroundColor"))) > 10
