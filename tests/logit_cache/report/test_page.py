"""The pages of `logit-cache report` and `inspect --html` in a real browser, narrow and wide, dark and light: nothing
asked of the network, nothing cut off, everything legible, and moved in by keys."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import report_folders as invented
from support.caches.texts import write_text_cache
from support.commands import ROOT

from logit_cache.report.page import make_report, passage_page
from storage import LogitCache

pytestmark = pytest.mark.browser

CHROMIUM = Path(os.environ.get("CHROMIUM_DIR", ROOT / "build" / "chromium")) / "chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"narrow": (390, 844), "wide": (1440, 900)}

# Returns the defects of the open page, a sentence each.
CHECKS = """() => {
  const wrong = [];
  for (const folded of document.querySelectorAll('details')) folded.open = true;
  const page = document.documentElement;
  if (page.scrollWidth > window.innerWidth) wrong.push(`the page is ${page.scrollWidth} wide`);

  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const linear = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const backgroundOf = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
      if (color[3] > 0) wrong.push('a background that shines through');
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.tagName.toLowerCase() === 'title') continue;
    texts += 1;
    const style = getComputedStyle(element);
    const color = numbers(element instanceof SVGElement ? style.fill : style.color);
    for (let e = element; e; e = e.parentElement)
      if (getComputedStyle(e).opacity !== '1') wrong.push(`see-through text: ${node.data}`);
    const [light, dark] = [luminance(color), luminance(backgroundOf(element))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    if (ratio < least) wrong.push(`contrast ${ratio.toFixed(2)}: ${node.data.trim().slice(0, 60)}`);
    const smallest = element instanceof SVGElement ? size * element.getScreenCTM().a : size;
    if (smallest < 9.5) wrong.push(`${smallest.toFixed(1)} px: ${node.data.trim().slice(0, 60)}`);
  }
  if (texts < 50) wrong.push(`only ${texts} texts`);

  for (const chart of document.querySelectorAll('svg.chart')) {
    const view = chart.viewBox.baseVal, name = chart.getAttribute('aria-label');
    const labels = [...chart.querySelectorAll('text')].map((label) => [label.firstChild.data, label.getBBox()]);
    if (labels.length < 3) wrong.push(`${name}: ${labels.length} labels`);
    labels.forEach(([words, box], i) => {
      const right = box.x + box.width, bottom = box.y + box.height;
      if (box.x < -0.5 || box.y < -0.5 || right > view.width + 0.5 || bottom > view.height + 0.5)
        wrong.push(`${name}: ${words} leaves the chart`);
      for (const [others, other] of labels.slice(i + 1))
        if (box.x < other.x + other.width && other.x < right && box.y < other.y + other.height && other.y < bottom)
          wrong.push(`${name}: ${words} overlaps ${others}`);
    });
    const frame = chart.getBoundingClientRect();
    for (const mark of chart.querySelectorAll('circle.dot, circle.ring, rect.dot')) {
      const box = mark.getBoundingClientRect();
      const sideways = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (sideways || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        wrong.push(`${name}: a mark leaves the chart`);
    }
  }
  return wrong;
}"""


@dataclass
class Seen:
    """A page in one window, with its console messages and requests."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.is_file():
        pytest.skip(f"no Chromium at {CHROMIUM}: run tests/support/scripts/chromium.sh install")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete recipe; and one of one seed with sweeps and runs, some with names too long for any column."""
    folder = tmp_path_factory.mktemp("pages")
    recipe = invented.recipe_folder(folder / "recipe")
    make_report([recipe], folder / "recipe.html")
    long = "a-name-that-nobody-would-give-a-run" * 4
    mixed = [
        invented.recipe_folder(folder / "one", seeds=(1,), roles=("teacher", "student", "control")),
        invented.sweep_folder(folder / "sweep"),
        invented.sweep_folder(folder / "few", trials=3),
        *(invented.run_folder(folder / name, seed=2, loss=3.5) for name in ("short", long)),
    ]
    data = json.loads((folder / "few/sweep.json").read_text())
    data["title"], data["metric"] = long, "a_metric_with_a_long_name_" * 3
    for trial in data["trials"]:
        trial["error"] = "an error that says a lot " * 10
        trial["value"] = 3.25
        trial["parameters"] |= {"x" * 90: f"{'choice' * 9}-{trial['number']}", "tiny": 1e-9 * (1 + trial["number"])}
    invented.write_json(folder / "few/sweep.json", data)
    make_report(mixed, folder / "mixed.html")
    return {"recipe": folder / "recipe.html", "mixed": folder / "mixed.html"}


def show(browser: Any, file: Path, window: str, scheme: str) -> Seen:
    width, height = SIZES[window]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
    seen = Seen(context.new_page())
    seen.page.on("console", lambda message: seen.messages.append(message.text))
    seen.page.on("pageerror", lambda error: seen.messages.append(str(error)))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.goto(file.as_uri())
    return seen


def luminance(page: Any) -> float:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)")
    return sum(color[:3]) / 3 / 255


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("window", SIZES)
@pytest.mark.parametrize("name", ["recipe", "mixed"])
def test_the_page_is_legible(browser: Any, pages: dict[str, Path], name: str, window: str, scheme: str) -> None:
    seen = show(browser, pages[name], window, scheme)
    assert seen.page.evaluate(CHECKS) == []
    assert seen.messages == []
    assert seen.requests == [pages[name].as_uri()], "nothing but the page itself"
    assert luminance(seen.page) < 0.15 if scheme == "dark" else luminance(seen.page) > 0.9
    assert seen.page.locator("svg.chart").count() >= 8
    assert seen.page.locator("svg.chart path.line").first.is_visible()
    seen.page.context.close()


def test_wide_tables_scroll_in_their_own_box(browser: Any, pages: dict[str, Path]) -> None:
    seen = show(browser, pages["recipe"], "narrow", "light")
    boxes = seen.page.evaluate("[...document.querySelectorAll('.scroll')].map((b) => [b.scrollWidth, b.clientWidth])")
    assert any(content > room for content, room in boxes)
    assert all(room <= SIZES["narrow"][0] for _, room in boxes)
    seen.page.context.close()


def test_marks_have_tooltips(browser: Any, pages: dict[str, Path]) -> None:
    seen = show(browser, pages["recipe"], "wide", "light")
    titles = seen.page.evaluate("[...document.querySelectorAll('svg.chart title')].map((t) => t.textContent)")
    assert any(title.startswith("student, mean of 3 seeds, epoch 1.75: 3.") for title in titles)
    assert any("seed 1: -0.23" in title for title in titles)
    seen.page.context.close()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("--soft: #5c6166", "--soft: #b0b5ba"), "contrast"),
        (("</main>", '<p style="width: 1500px">wide</p></main>'), "the page is"),
        (('text-anchor="middle"', 'text-anchor="start" dx="-60"'), "leaves the chart"),
        ((".chart text {", ".chart text { letter-spacing: 1em;"), "overlaps"),
    ],
)
def test_the_checks_find_defects(
    browser: Any, pages: dict[str, Path], tmp_path: Path, change: tuple[str, str], found: str
) -> None:
    page = pages["recipe"].read_text(encoding="utf-8")
    assert change[0] in page
    (tmp_path / "page.html").write_text(page.replace(*change), encoding="utf-8")
    seen = show(browser, tmp_path / "page.html", "narrow", "light")
    assert any(found in wrong for wrong in seen.page.evaluate(CHECKS))
    seen.page.context.close()


def test_scripts_and_requests_are_refused(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    page = pages["recipe"].read_text(encoding="utf-8")
    bad = "<script>document.title = 'taken'</script><img src='https://example.com/a.png'>"
    (tmp_path / "page.html").write_text(page.replace("</main>", f"{bad}</main>"), encoding="utf-8")
    seen = show(browser, tmp_path / "page.html", "wide", "light")
    assert seen.page.title() == "Baby Llama, scale tiny"
    assert sum("Content Security Policy" in message for message in seen.messages) == 2
    seen.page.context.close()


def detail(page: Any) -> str:
    """The details that are seen, which are those of one token."""
    seen = [found for found in page.locator(".detail").all() if found.is_visible()]
    (text,) = [found.inner_text() for found in seen]
    return str(text).splitlines()[0]


@pytest.fixture(scope="module")
def passage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a cache with spaces, line ends, emoji, bytes that are no text, and markup in its text."""
    folder = tmp_path_factory.mktemp("passage")
    number = len(write_text_cache(folder / "cache"))
    (folder / "page.html").write_bytes(passage_page(LogitCache.open(str(folder / "cache")), 0, number))
    return folder / "page.html"


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("window", SIZES)
def test_a_passage_is_legible_and_moved_in_by_keys(browser: Any, passage: Path, window: str, scheme: str) -> None:
    seen = show(browser, passage, window, scheme)
    page = seen.page
    assert detail(page).startswith("After position 0, <s>: The follows")
    page.keyboard.press("Tab")
    for key, position in (("ArrowRight", 1), ("ArrowDown", 2), ("ArrowLeft", 1), ("ArrowRight", 2)):
        page.keyboard.press(key)
        assert detail(page).startswith(f"After position {position},")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert detail(page).startswith("After position 2,")
    focused = "document.activeElement.className || document.activeElement.type"
    assert page.evaluate(focused) == "radio"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "detail", "which can be scrolled by keys"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) not in ("radio", "detail"), "all tokens are one stop"
    assert page.evaluate(CHECKS) == []
    assert (seen.messages, seen.requests) == ([], [passage.as_uri()])
    page.context.close()


@pytest.mark.parametrize("scripts", [True, False])
def test_pointing_shows_a_token_and_choosing_keeps_it(browser: Any, passage: Path, scripts: bool) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, java_script_enabled=scripts, offline=True)
    page = context.new_page()
    page.goto(passage.as_uri())
    tokens = page.locator(".tokens label")
    tokens.nth(5).click()
    page.mouse.move(0, 0)
    assert detail(page).startswith("After position 5,")
    tokens.nth(8).hover()
    hovered = page.locator(".tokens label:hover + .detail")
    assert hovered.inner_text().startswith("After position 8,")
    box = hovered.bounding_box()
    assert box == page.locator(".tokens label:has(:checked) + .detail").bounding_box(), "it covers the other"
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    page.mouse.move(0, 0)
    assert detail(page).startswith("After position 5,")
    last = tokens.last
    last.click()
    assert "the stream ends" in detail(page)
    context.close()


def test_the_text_of_a_passage_reads_as_text(browser: Any, passage: Path) -> None:
    seen = show(browser, passage, "wide", "light")
    shown = seen.page.evaluate("[...document.querySelectorAll('.tokens label')].map((t) => t.textContent).join('')")
    for words in ("The cat sat on the mat.\n\n\tIt saw 😀 and ⟨F0 9F⟩", "</p><script>alert(1)</script>"):
        assert words in shown
    rows = seen.page.evaluate("[...document.querySelectorAll('.tokens label')].map((t) => t.getBoundingClientRect().y)")
    assert len({round(y) for y in rows}) >= 3, "lines end where the text's do"
    seen.page.context.close()


def test_each_recipe_of_a_page_has_a_passage_of_its_own(browser: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        invented.recipe_folder(tmp_path / name, seeds=(0,), roles=("student", "control"))
    make_report([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    seen = show(browser, tmp_path / "page.html", "wide", "dark")
    assert seen.page.locator("input:checked").count() == 2
    seen.page.context.close()
