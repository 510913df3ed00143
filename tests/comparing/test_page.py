"""The page of a comparison: what it says, and what Chromium draws of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import needs
import numpy as np
import pytest
from comparisons import make_comparison, make_run

from anepy.comparing import charts
from anepy.comparing.page import page
from anepy.comparing.result import Ablation, Comparison, Group, columns

NAMES = ["baseline", "opt", "ane", "dynamic", "double-buffer", "max", "max-offload_classifier"]


def crowded() -> Comparison:
    """Return seven variants, one of which failed, and switches with wide and narrow intervals."""
    result = make_comparison({name: 500.0 - 40 * at for at, name in enumerate(NAMES)})
    runs = result.groups[0].runs
    runs[2] = make_run("ane", 460.0, scatter=0.3)
    runs[3] = make_run("dynamic", 1.0, rounds=0, error="the device failed")
    runs[4].steps["loss"] = [loss * (1 + 1e-5 * at) for at, loss in
                             enumerate(runs[4].steps["loss"])]  # fmt: skip
    for at, (name, ms) in enumerate({"prealloc": 470.0, "simd_adam": 560.0}.items()):
        runs.append(make_run(f"baseline+{name}", ms, 50.0 - 20 * at))
        runs.append(make_run(f"max-{name}", 900.0 - 300 * at))
        for form, label in (("add", f"baseline+{name}"), ("leave out", f"max-{name}")):
            base = "baseline" if form == "add" else "max"
            result.ablation.append(Ablation(name, form, base, label))
    odd = make_run("baseline+fp16_cache", 480.0)
    odd.steps["wall_ms"] = [ms * (1 + 0.5 * math.sin(at)) for at, ms in
                            enumerate(odd.steps["wall_ms"])]  # fmt: skip
    runs.append(odd)
    result.ablation.append(Ablation("fp16_cache", "add", "baseline", odd.label))
    result.ablation.append(
        Ablation("metal_dw", "add", "baseline", "", "switch metal_dw means nothing on device cpu")
    )
    result.refused = {"opt+metal_dw": "switch metal_dw means nothing on device cpu"}
    return result


def pages() -> dict[str, str]:
    one_round = make_comparison(
        groups=[Group([make_run("baseline", 5.0, rounds=1), make_run("opt", 7.0, rounds=1)])]
    )
    other = make_comparison({"opt": 300.0})
    other.machine = other.machine | {"processor": "Apple M4"}
    return {
        "two": page([("", make_comparison(ablate=True))]),
        "crowded": page([("", crowded())]),
        "one-round": page([("", one_round)]),
        "machines": page([("epyc", make_comparison()), ("m4", other)]),
    }


# Without a browser


@pytest.mark.parametrize("name", ["two", "crowded", "one-round", "machines"])
def test_page_is_well_formed_and_needs_nothing_beside_it(name: str) -> None:
    text = pages()[name]
    assert not re.search(r"https?:|//[a-z]|<script|<link|<img|@import|url\(|\bon\w+=", text)
    open_tags: list[str] = []
    ids: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            ids.extend(value or "" for key, value in attrs if key == "id")
            if tag not in ("meta", "wbr") and self.get_starttag_text()[-2:] != "/>":  # type: ignore[index]
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("rect", "line", "circle", "polyline"), tag

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    parser = Parser(convert_charrefs=True)
    parser.feed(text)
    parser.close()
    assert open_tags == [] and len(ids) == len(set(ids))
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).lower()


def test_page_escapes_names() -> None:
    evil = '<script>alert("x")</script>&'
    result = make_comparison({"baseline": 500.0, evil: 440.0})
    result.model = result.model | {"name": evil}
    result.notes, result.command = [evil], [evil]
    text = page([("", result)])
    assert "<script" not in text and "&lt;script&gt;" in text


def test_page_marks_can_be_reached_and_say_their_numbers() -> None:
    text = pages()["two"]
    labels = re.findall(r'tabindex="0" role="img" aria-label="([^"]+)"', text)
    assert any(re.fullmatch(r"opt: 453.3 ms per step, quartiles .*-11.7 % .*baseline", label)
               for label in labels)  # fmt: skip
    assert any("device 250.4" in label and "classifier" in label for label in labels)
    assert any("bit-identical" in label for label in labels)
    assert any(label.startswith("simd_adam, added to baseline: -1.5 %") and "helps" in label
               for label in labels)  # fmt: skip
    assert "not on this device: switch metal_dw means nothing here" in text


def test_phases_add_up_to_the_time_per_step() -> None:
    for column in columns([("", make_comparison(ablate=True))]):
        total = sum(charts.parts(column).values())
        run = column.comparison.runs(column.label)[0]
        wall = sum(run.timed("wall_ms")) + sum(run.timed_updates("wall_ms"))
        assert total == pytest.approx(wall / len(run.timed("wall_ms")))


def palette(scheme: str) -> list[str]:
    style = Path(charts.__file__).with_name("report.css").read_text()
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--p(\d): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    return [found[str(index)] for index in range(10)]


# Machado, Oliveira & Fernandes, IEEE TVCG 15 (2009), severity 1: on linear sRGB.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(color: str, matrix: Any) -> np.ndarray:
    """Return CIELAB (D65) of an sRGB colour as somebody sees it."""
    values = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(matrix) @ linear, 0, 1)
    xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
           [0.0193339, 0.1191920, 0.9503041]] @ seen / [0.95047, 1.0, 1.08883]  # fmt: skip
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("sight", list(BLINDNESS))
def test_phases_differ_for_every_eye(scheme: str, sight: str) -> None:
    """A difference of 2 is just seen; neighbours touch, the others only meet in the legend."""
    seen = [lab(color, BLINDNESS[sight]) for color in palette(scheme)]
    for at, one in enumerate(seen):
        for beside, other in enumerate(seen[:at]):
            least = 30 if at - beside == 1 else 12
            assert np.linalg.norm(one - other) > least, (at, beside)


def test_ticks_are_round_and_apart() -> None:
    for low, high in ((0.99, 1.01), (0.5, 1.1), (0.9, 1.5), (0.34, 3.0), (0.98, 2.0)):
        scale = charts._Scale(math.log(low), math.log(high))
        ticks = scale.ticks()
        assert 1.0 in ticks and len(ticks) >= 2
        places = [scale.place(tick) for tick in ticks]
        assert min(np.diff(places)) >= 17 and places == sorted(places)


# What is drawn


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    executable = needs.program("chromium", "chromium-browser", "google-chrome", "chrome")
    session = browser.Browser(executable, tmp_path_factory.mktemp("profile"))
    yield session
    session.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pages")
    for name, text in pages().items():
        (found / f"{name}.html").write_text(text, encoding="utf-8")
    if wanted := os.environ.get("ANEPY_TEST_PAGES"):  # for a look by eye
        for name, text in pages().items():
            (Path(wanted) / f"{name}.html").write_text(text, encoding="utf-8")
    return found


# All words that are drawn, with their boxes, colours and what is behind them.
TEXTS = """
(() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest('title, style')) continue;
    if (!parent.checkVisibility({checkVisibilityCSS: true, contentVisibilityAuto: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter(box => box.width > 0);
    if (!boxes.length) continue;
    const style = getComputedStyle(parent);
    let ground = null;
    if (parent.tagName === 'text') {
      const box = parent.previousElementSibling;
      ground = getComputedStyle(box).fill;
    } else {
      for (let e = parent; e && ground === null; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (color !== 'rgba(0, 0, 0, 0)') ground = color;
      }
    }
    const holder = parent.closest('.scroll');
    found.push({
      text: node.data.trim(), tag: parent.tagName, ground,
      color: parent.tagName === 'text' ? style.fill : style.color,
      scrolls: !!holder, figure: parent.closest('figure')?.id ?? '',
      boxes: boxes.map(b => [b.left, b.top, b.right, b.bottom]),
    });
  }
  return found;
})()
"""


def channels(color: str) -> list[float]:
    found = re.findall(r"[\d.]+", color)
    assert color.startswith("rgb") and len(found) == 3, color
    return [float(value) / 255 for value in found]


def luminance(color: str) -> float:
    """WCAG 2 relative luminance."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def assert_texts_are_whole(texts: list[dict[str, Any]], width: int) -> None:
    """No word leaves the window, and no two of a figure lie on each other."""
    for item in texts:
        for left, _, right, _ in item["boxes"]:
            if not item["scrolls"]:
                assert left >= -0.5 and right <= width + 0.5, item
    for figure in {item["figure"] for item in texts}:
        boxes = [(item["text"], box) for item in texts if item["figure"] == figure
                 for box in item["boxes"] if not item["scrolls"]]  # fmt: skip
        for at, (text, a) in enumerate(boxes):
            for other, b in boxes[:at]:
                across = min(a[2], b[2]) - max(a[0], b[0])
                down = min(a[3], b[3]) - max(a[1], b[1])
                assert across <= 0.5 or down <= 3, (figure, text, other, a, b)


SCREENS = [(360, False), (400, True), (1000, False), (1000, True), (1600, True)]


@pytest.mark.parametrize("name", ["two", "crowded", "one-round", "machines"])
@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_words_are_whole_and_legible(
    chromium: browser.Browser, folder: Path, name: str, width: int, dark: bool
) -> None:
    chromium.show(folder / f"{name}.html", width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    texts = chromium.run(TEXTS)
    assert len(texts) > 60
    assert_texts_are_whole(texts, width)
    for item in texts:
        assert contrast(item["color"], item["ground"]) >= 4.5, item
    assert (luminance(texts[0]["ground"]) < 0.05) is dark, "the page follows the system"
    for text in ("Time per step", "Where the time goes", "All numbers"):
        assert any(item["text"] == text for item in texts)


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", ["two", "crowded", "one-round", "machines"])
def test_bars_are_as_long_as_their_numbers(
    chromium: browser.Browser, folder: Path, name: str, width: int
) -> None:
    chromium.show(folder / f"{name}.html", width)
    bars = chromium.run(
        "[...document.querySelectorAll('#time svg')].map(svg => {"
        "const bar = svg.querySelector('.bar').getBoundingClientRect();"
        "const ends = svg.querySelectorAll('.range')[0].getBoundingClientRect();"
        "const box = svg.getBoundingClientRect();"
        "return {value: +svg.querySelector('.bar').dataset.value, left: bar.left,"
        " width: bar.width, low: ends.left, high: ends.right, from: box.left, to: box.right,"
        " label: svg.getAttribute('aria-label')}})"
    )
    assert len(bars) == {"two": 2, "crowded": 6, "one-round": 2, "machines": 3}[name]
    scale = bars[0]["width"] / bars[0]["value"]
    for bar in bars:
        assert bar["left"] == pytest.approx(bar["from"], abs=0.1), "bars begin at zero"
        assert bar["width"] == pytest.approx(scale * bar["value"], abs=0.2)
        low, high = map(float, re.findall(r"quartiles ([\d.]+) to ([\d.]+)", bar["label"])[0])
        # The label has one decimal.
        assert bar["low"] - bar["left"] == pytest.approx(scale * low, abs=0.5 + 0.06 * scale)
        assert bar["high"] - bar["left"] == pytest.approx(scale * high, abs=0.5 + 0.06 * scale)
        assert bar["high"] <= bar["to"] + 0.5


@pytest.mark.parametrize("width", [360, 1600])
def test_segments_are_as_long_as_their_numbers(
    chromium: browser.Browser, folder: Path, width: int
) -> None:
    chromium.show(folder / "crowded.html", width)
    drawings = chromium.run(
        "[...document.querySelectorAll('#phases .chart svg')].map(svg => ({"
        "label: svg.getAttribute('aria-label'), to: svg.getBoundingClientRect().right,"
        "parts: [...svg.querySelectorAll('.segment')].map(e => {"
        "const box = e.getBBox();"
        "return [e.dataset.name, +e.dataset.value, box.x, box.width, getComputedStyle(e).fill]}),"
        "words: [...svg.querySelectorAll('text')].map(e => {"
        "const a = e.getBBox(), b = e.previousElementSibling.getBBox();"
        "return [a.x, a.x + a.width, b.x, b.x + b.width]})}))"
    )
    assert len(drawings) == 6
    scales = []
    for drawing in drawings:
        assert [part[0] for part in drawing["parts"]] == [
            name for name in charts.SEGMENTS if name != "compile"
        ]
        at = 0.0
        for _, value, left, length, _ in drawing["parts"]:
            assert left == pytest.approx(at, abs=0.1), "no gap, no overlap"
            at = left + length
            scales.append(length / value)
        assert len({part[4] for part in drawing["parts"]}) == 9
        for left, right, begin, end in drawing["words"]:
            assert begin <= left and right <= end, "a word fits its segment"
    assert drawings[0]["words"] and max(scales) == pytest.approx(min(scales), rel=0.02)


def test_dots_lie_where_their_ratios_are(chromium: browser.Browser, folder: Path) -> None:
    chromium.show(folder / "crowded.html", 1000)
    dots = chromium.run(
        "[...document.querySelectorAll('.switches svg')].map(svg => ({"
        "value: +svg.querySelector('.dot').dataset.value,"
        "dot: svg.querySelector('.dot').getBBox().x + 5,"
        "zero: svg.querySelector('.zero').getBBox().x,"
        "kind: svg.querySelector('.estimate').getAttribute('class'),"
        "line: (e => e && [e.getBBox().x, e.getBBox().x + e.getBBox().width])"
        "(svg.querySelector('.estimate line')),"
        "stroke: getComputedStyle(svg.querySelector('.dot')).stroke,"
        "fill: getComputedStyle(svg.querySelector('.dot')).fill}))"
    )
    assert len(dots) == 5
    scale = [(dot["dot"] - dot["zero"]) / math.log(dot["value"]) for dot in dots]
    assert scale == pytest.approx([scale[0]] * 5, rel=0.05) and scale[0] > 50
    kinds = {dot["kind"].split()[1] for dot in dots}
    assert kinds == {"helps", "costs", "none"}
    for dot in dots:
        low, high = dot["line"]
        kind = dot["kind"].split()[1]
        assert low - 0.1 <= dot["dot"] <= high + 0.1
        crosses = low <= dot["zero"] <= high
        assert crosses is (kind == "none")
        assert (dot["fill"] == dot["stroke"]) is (kind != "none"), "filled if it excludes 0"


@pytest.mark.parametrize("dark", [False, True])
def test_marks_stand_out_from_the_ground(
    chromium: browser.Browser, folder: Path, dark: bool
) -> None:
    chromium.show(folder / "crowded.html", 1000, dark=dark)
    colors = chromium.run(
        "[...document.querySelectorAll('.bar, .segment, .legend rect')]"
        ".map(e => getComputedStyle(e).fill).concat("
        "[...document.querySelectorAll('.range, .curve, .bound, .dot, .estimate line, .zero')]"
        ".map(e => getComputedStyle(e).stroke))"
    )
    ground = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert len(set(colors)) > 12
    for color in set(colors):
        assert contrast(color, ground) >= 3.0, color


def test_curves_run_through_their_losses(chromium: browser.Browser, folder: Path) -> None:
    chromium.show(folder / "two.html", 1000)
    boxes = chromium.run(
        "[...document.querySelectorAll('#loss .plot.loss .curve')].map(e => {"
        "const b = e.getBoundingClientRect(), f = e.closest('.frame').getBoundingClientRect();"
        "return [b.left - f.left, b.right - f.right, b.top - f.top, f.bottom - b.bottom,"
        " e.getAttribute('points').split(' ').length]})"
    )
    assert len(boxes) == 2
    for left, right, top, bottom, count in boxes:
        assert count == 24 and abs(left) < 2.5 and abs(right) < 2.5
        # The curve fills the frame but for a twentieth above and below.
        assert 220 * 0.03 < top < 220 * 0.07 and 220 * 0.03 < bottom < 220 * 0.07
    assert chromium.run("document.querySelectorAll('.plot.apart').length") == 0, "bit-identical"


def test_page_works_with_the_keyboard_alone(chromium: browser.Browser, folder: Path) -> None:
    chromium.show(folder / "two.html", 1000)
    stops = chromium.run(
        "[...document.querySelectorAll('[tabindex=\"0\"], summary')]"
        ".filter(e => e.checkVisibility({contentVisibilityAuto: true})).length"
    )
    seen = []
    for _ in range(stops):
        for kind in ("keyDown", "keyUp"):
            chromium.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab",
                          windowsVirtualKeyCode=9)  # fmt: skip
        seen.append(
            chromium.run(
                "(e => [e.tagName, e.getAttribute('aria-label') ?? e.textContent,"
                " getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)])"
                "(document.activeElement)"
            )
        )
    assert len({label for _, label, _, _ in seen if label != "table"}) >= stops - 3
    assert all(label for _, label, _, _ in seen)
    for tag, _, style, thick in seen:
        assert style != "none" and (thick >= 2 or tag == "SUMMARY"), "the focus is seen"
    chromium.run("document.querySelector('summary').focus()")
    for kind in ("keyDown", "keyUp"):
        chromium.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter",
                      windowsVirtualKeyCode=13, text="\r")  # fmt: skip
    assert chromium.run("document.querySelector('details').open"), "tables behind charts"


def test_page_in_print_is_light_and_shows_its_tables(
    chromium: browser.Browser, folder: Path, tmp_path: Path
) -> None:
    chromium.show(folder / "crowded.html", 750, dark=True, media="print")
    texts = chromium.run(TEXTS)
    for item in texts:
        assert luminance(item["ground"]) > 0.9 or item["tag"] == "text", item
        assert contrast(item["color"], item["ground"]) >= 4.5, item
    seen = chromium.run(
        "[...document.querySelectorAll('details td')].map(e => e.checkVisibility())"
    )
    assert len(seen) > 50 and all(seen), "tables behind charts"
    ground = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)", "no ink for the ground"
    right = chromium.run(
        "Math.max(...[...document.querySelectorAll('table')]"
        ".map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 750, "no column is cut off on paper"
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_page_asks_nobody_for_anything(chromium: browser.Browser, folder: Path) -> None:
    chromium.requested.clear()
    chromium.show(folder / "crowded.html", 1000)
    assert chromium.requested == [(folder / "crowded.html").as_uri()]
