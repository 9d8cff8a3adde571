"""The page in a real browser: every view, search, keyboard, labels, hostile text, a million features, no error."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saetrain
from saetrain.features.layout import Slots, chunk_key, columns, metadata
from saetrain.probing.corpus import Corpus, Cutting
from saetrain.reading.latents import Features
from saetrain.reporting.report import report
from saetrain.training.outcome import keep_evaluation
from saetrain.view.labels import Labels
from saetrain.view.live import Live
from saetrain.view.pairs import Pairs
from saetrain.view.server import Server
from saetrain.view.site import Site
from support.causal import dictionary as random_dictionary
from support.causal import texts, tiny
from support.contrast import faint, faint_now
from support.features import LATENTS, TINY, dictionary, store

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
WANTED = os.environ.get("NEEDS_CHROMIUM") == "1"  # where its absence is a failure
if CHROMIUM is None and not WANTED:
    pytest.skip("no Chromium on this machine: the page is not tried in a browser", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PATIENCE = 120  # seconds
HOSTILE = "<img src=x onerror='window.hit=1'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=1000 * PATIENCE)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    store(folder / "acts.zarr")
    dictionary(folder / "dictionary", "topk")
    saetrain.build_features(folder / "dictionary", folder / "acts.zarr", folder / "out", fsync=False, **TINY)
    saetrain.interactions(folder / "dictionary", folder / "dictionary", folder / "product", k=4, thresholds=[0.5])
    (folder / "run").mkdir()
    lines: list[dict[str, Any]] = [
        {"step": 10 * i, "tokens": 640 * i, "loss": 1 / i, "eval_fvu": 0.5 / i, "l0": 5.0} for i in (1, 2, 3)
    ]
    lines = [line | {"mfu": None if line["step"] == 30 else 0.25} for line in lines]
    lines[-1] |= {"seconds": 75.0, "time": "2026-03-01T12:30:30Z"}
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keep_evaluation(folder / "run", {"model": HOSTILE, "text": ["held/out"]} | evaluated())
    return folder / "out"


def evaluated() -> dict[str, Any]:
    model = tiny()
    corpus = Corpus(model, texts(4), Cutting(context=12))
    return saetrain.evaluate(random_dictionary(latents=LATENTS), model, corpus).to_json()


class Opened:
    """A page on a server of its own, and what its console said."""

    def __init__(self, browser: Any, site: Site, **context: Any) -> None:
        self.server = Server(site)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(1000 * PATIENCE)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def go(self, path: str) -> Any:
        self.page.goto(self.server.url + path.removeprefix("/"))
        self.page.wait_for_selector("main[data-ready] h1")
        return self.page

    def until(self, expression: str, due: Any = True) -> None:
        """Wait for the value of an expression; Playwright's own wait needs eval, which our pages forbid."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.page.evaluate(expression)) != due:
            assert time.monotonic() < deadline, f"{expression} is {found!r}, not {due!r}"
            self.page.wait_for_timeout(50)

    def title(self, text: str) -> None:
        self.until("document.querySelector('h1')?.textContent", text)

    def listed(self, count: int) -> None:
        self.until("document.querySelectorAll('table.list tbody tr').length", count)

    def close(self) -> None:
        self.context.close()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def opened(browser: Any, result: Path, tmp_path: Path) -> Iterator[Opened]:
    features = saetrain.open_features(result)
    features.text = lambda ids, running=False: tuple(HOSTILE if i == 2 else f" word{i}" for i in ids)  # type: ignore[method-assign]
    sae = random_dictionary(latents=LATENTS)
    product = Pairs(saetrain.open_interactions(result.parent / "product"), [features])
    site = Site(features, Labels(tmp_path / "labels.json"), result.parent / "run", Live(sae, tiny(), 4.0), [product])
    made = Opened(browser, site)
    yield made
    made.close()
    assert made.errors == []


def test_every_view_is_drawn_at_both_widths_and_nothing_sticks_out(opened: Opened) -> None:
    views = {
        "/": "out",
        "/feature/4": "Feature 4",
        "/feature/3": "Feature 3",
        "/compare?ids=4,5,6,8": "Compare",
        "/search?q=word5": "Search: word5",
        "/text?t=red+dog": "Features of a text",
        "/steer?feature=4": "Steering",
        "/interactions": "Interactions",
        "/interactions?half=columns&line=5": "Interactions",
        "/run": "Run",
    }
    for width in (1280, 390):
        opened.page.set_viewport_size({"width": width, "height": 900})
        for path, title in views.items():
            page = opened.go(path)
            assert page.inner_text("h1") == title
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
    for path in views:
        page = opened.go(path)
        unnamed = "[...document.querySelectorAll('button, a, input, select, textarea, [role=button]')].filter(e => "
        unnamed += "!(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).length"
        assert page.evaluate(unnamed) == 0, path
        assert faint(page) == [], path
    assert opened.go("/feature/99").inner_text(".empty") == "no feature 99: there are 0 to 39"
    opened.errors = [text for text in opened.errors if "400" not in text]  # that answer, as the browser reports it


def test_the_button_that_writes_is_readable_under_the_pointer_and_at_work(opened: Opened) -> None:
    page = opened.go("/steer?feature=4")
    button = page.locator("main button[type=submit]")
    button.hover()
    assert faint(page) == []
    button.evaluate("button => (button.disabled = true)")
    assert faint(page) == []
    controls = {  # each of these is seen
        'button. disabled "Write" 1.': "main button { color: var(--hover) !important }",
        'input. "Number, token': "::placeholder { opacity: 0.5 !important }",
        "input. edge 1.": "input { border-color: var(--line) !important }",
    }
    for told, rule in controls.items():
        page.evaluate("rule => document.styleSheets[0].insertRule(rule, document.styleSheets[0].cssRules.length)", rule)
        found = faint(page)
        assert {theme for theme in ("light", "dark") for one in found if one.startswith(f"{theme}: {told}")} == {
            "light",
            "dark",
        }, (told, found)


def test_a_bar_filters_the_list_and_the_address_holds_it(opened: Opened) -> None:
    page = opened.go("/")
    page.locator(".chart .pick .bar").first.wait_for()
    bar = page.locator(".chart [role=button][tabindex='0']").first
    count = int(str(bar.get_attribute("aria-label")).rsplit(": ", 1)[1])
    bar.focus()
    page.keyboard.press("Enter")
    opened.until("location.search.includes('density=')")
    opened.listed(count)
    page.reload()
    opened.listed(count)
    page.go_back()
    opened.until("!location.search.includes('density=')")


def test_keys_move_search_and_compare(opened: Opened) -> None:
    page = opened.go("/feature/2")
    page.keyboard.press("j")
    opened.title("Feature 4")  # 3 is dead
    page.keyboard.press("k")
    opened.title("Feature 2")
    page.keyboard.press("c")
    page.keyboard.press("j")
    opened.title("Feature 4")
    page.keyboard.press("c")
    page.get_by_text("Compare 2").click()
    opened.title("Compare")
    assert "ids=2,4" in page.url
    page.keyboard.press("/")
    page.keyboard.type("12")
    page.keyboard.press("Enter")
    opened.title("Feature 12")
    page.keyboard.press("/")
    page.keyboard.type("word5")
    page.keyboard.press("Enter")
    opened.title("Search: word5")
    assert page.locator("table.list tbody tr").count() > 0


def test_kinds_of_examples_and_more_of_the_text(opened: Opened) -> None:
    page = opened.go("/feature/4")
    first = page.locator(".example").first
    before = first.locator(".token").count()
    assert first.locator(".token.here").count() == 1
    page.locator(".example button", has_text="more").first.click()
    assert page.locator(".example .token").count() > before
    page.get_by_role("tab", name="By strength").click()
    page.wait_for_selector("h3 >> text= to ")
    assert page.locator("h3").count() >= 3
    page.get_by_role("tab", name="Not active").click()
    opened.until("!document.querySelector('.example .token.on.here') && !!document.querySelector('.example .here')")


def test_a_label_survives_a_restart(browser: Any, opened: Opened, result: Path) -> None:
    page = opened.go("/feature/4")
    page.fill("#label", HOSTILE)
    page.press("#label", "Enter")
    page.get_by_text("Label saved").wait_for()
    again = Opened(browser, Site(saetrain.open_features(result), Labels(opened.server.site.labels.path)))
    assert again.go("/feature/4").input_value("#label") == HOSTILE
    assert again.go("/?labelled=1").inner_text("table.list .label") == HOSTILE
    assert again.page.evaluate("window.hit") is None
    again.close()
    assert again.errors == []


def test_hostile_tokens_stay_text(opened: Opened) -> None:
    views = (
        "/",
        "/feature/4",
        "/feature/5",
        "/compare?ids=4,5",
        "/search?q=word1",
        "/interactions",
        "/interactions?line=5",
    )
    for path in views:
        page = opened.go(path)
        assert page.evaluate("window.hit") is None, path
        assert page.locator("main img").count() == 0, path
    opened.go("/feature/5")
    assert opened.page.get_by_text(HOSTILE, exact=False).count() > 0, "the token is shown, as text"


def test_a_pasted_text_and_steering(opened: Opened) -> None:
    page = opened.go("/text?t=red%20dog%20house")
    page.wait_for_selector(".paste button.token")
    page.locator(".paste button.token").nth(1).click()
    page.wait_for_selector(".paste button.token[aria-pressed=true]")
    assert page.locator(".near li").count() > 0
    page = opened.go("/steer?feature=5&prompt=red&value=0.9&tokens=6")
    most, length = (opened.server.site.feature(5)[name] for name in ("max", "length"))
    opened.until("document.querySelector('output').textContent.includes('0.9 of the norm')")
    assert f"{0.9 * 4.0 / length / most:.3g} of its largest" in page.inner_text("output")
    page.get_by_role("button", name="Write").click()
    page.get_by_text("Edited rows moved by").wait_for()
    assert page.locator(".written").nth(1).inner_text() != ""
    assert "tokens=6" in page.url
    page.fill("#features", "5, dog")
    page.get_by_role("button", name="Write").click()
    page.get_by_text("Features are given by their numbers, as 603,88; not dog.").wait_for()


def test_an_mfu_that_was_left_out_at_the_end_is_not_an_earlier_one(opened: Opened) -> None:
    page = opened.go("/run")
    heading = page.locator("h3", has_text="matrix speed")
    heading.wait_for()
    assert heading.locator("b").inner_text() == "left out"


def test_interactions_lead_from_line_to_line_and_to_features(opened: Opened, result: Path) -> None:
    w = saetrain.open_interactions(result.parent / "product")
    page = opened.go("/interactions?order=kept&falling=1")
    opened.listed(LATENTS)
    kept = w.rows.arrays["kept"][:]
    first = min(range(LATENTS), key=lambda i: (-kept[i], i))
    page.locator("table.list tbody tr .number").first.click()
    opened.until("document.querySelector('h2.big')?.textContent", f"Row {first}")
    largest = w.rows[first].top_index[0]
    page.locator(".entries .number").first.click()
    opened.until("document.querySelector('h2.big')?.textContent", f"Column {largest}")
    page.get_by_role("link", name="Feature", exact=True).click()
    opened.title(f"Feature {largest}")
    opened.until("document.querySelectorAll('.entries').length", 2)  # its row and its column
    page.get_by_text("All that is kept of its row").click()
    opened.until("document.querySelector('h2.big')?.textContent", f"Row {largest}")
    page.get_by_role("tab", name="columns").click()
    opened.until("location.search.includes('half=columns')")
    assert opened.go("/interactions?line=99").inner_text(".empty") == "no row 99: there are 0 to 39"
    opened.errors = [text for text in opened.errors if "400" not in text]  # that answer, as the browser reports it


def test_dead_ones_and_labels_have_lists_of_their_own(opened: Opened) -> None:
    page = opened.go("/")
    page.get_by_text("dead on these rows").click()
    opened.listed(int((opened.server.site.features.array("stat/count") == 0).sum()))
    assert page.inner_text("table.list .number >> nth=0") == "3"
    opened.server.site.labels.put(6, "red")
    page = opened.go("/?labelled=1")
    with page.expect_download() as loaded:
        page.get_by_text("Download the labels").click()
    assert json.loads(loaded.value.path().read_text())["labels"] == {"6": "red"}


def test_the_run_shows_its_curves_and_what_the_model_loses(opened: Opened) -> None:
    page = opened.go("/run")
    assert HOSTILE in page.inner_text("main")
    assert page.evaluate("window.hit") is None
    assert page.locator("svg.chart").count() == 3  # of the loss, of FVU and of MFU
    assert "active latents a token (L0) 5" in page.inner_text("main"), "it is constant"
    assert "trained 1 March 2026, 12:29 to 12:30 UTC · 1 min 15 s of training" in page.inner_text("main")
    value = evaluated()["loss_recovered"]["zero"]["value"]
    shown = page.locator("tr", has_text="Loss recovered, from zero").locator("b").inner_text()
    assert float(shown.replace("\u2212", "-").replace(",", "")) == pytest.approx(value, rel=1e-3)


TICKS = """async ([low, high, log]) => {
  const { bars } = await import("/static/charts.js");
  const edge = (share) => (log ? low * (high / low) ** share : low + (high - low) * share);
  const edges = Array.from({ length: 9 }, (_, i) => edge(i / 8));
  const drawn = bars({ edges, counts: edges.slice(1).map(() => 1), log, title: "t" });
  return [...drawn.querySelectorAll("text.tick:not(.count)")].map((tick) => tick.textContent);
}"""


@pytest.mark.parametrize(
    ("low", "high", "log", "due"),
    [
        (2, 80, True, ["3", "10", "30"]),
        (1, 10_000, True, ["1", "10", "100", "1,000", "10,000"]),
        (1e-5, 0.3, True, ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]),
        (21, 23, True, ["21", "21.5", "22", "22.5", "23"]),
        (0, 1, False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (-0.8, 0.8, False, ["\u22120.5", "0", "0.5"]),
    ],
)
def test_scales_have_round_numbers(opened: Opened, low: float, high: float, log: bool, due: list[str]) -> None:
    assert opened.go("/run").evaluate(TICKS, [low, high, log]) == due


def test_a_search_begins_with_a_part_of_each_kind(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    opened.page.set_viewport_size({"width": 390, "height": 844})
    line = {"id": 4, "label": "", "density": 0.1, "max": 2.0, "tokens": ["a"] * 8}
    found = [line | {"weight": i / 64} for i in range(32)]
    answer = {"text": "word5", "number": [], "label": [], "token": found, "promoted": found[:3]}
    monkeypatch.setattr(opened.server.site, "search", lambda text: answer)
    page = opened.go("/search?q=word5")
    tables = page.locator("table.list")
    assert [tables.nth(i).locator("tbody tr").count() for i in (0, 1)] == [20, 3]
    assert page.get_by_text("Share of its rows").is_visible(), "on a phone too: it is what the list is ordered by"
    page.get_by_role("button", name="Show all 32").click()
    assert tables.first.locator("tbody tr").count() == 32
    assert page.get_by_role("button", name="Show all").count() == 0


@pytest.mark.parametrize("runs", [1, 2])
def test_the_report_fits_a_phone_and_is_readable_in_light_and_dark(browser: Any, runs: int, tmp_path: Path) -> None:
    for name in ("first", "second")[:runs]:
        (tmp_path / name).mkdir()
        ends = {"eval_l0": 31.9985, "eval_l0_low": 31.9970, "eval_l0_high": 32.0, "eval_dead": 0.125, "eval_rows": 4722}
        ends |= {"eval_fvu": 0.1467, "eval_fvu_low": 0.1426, "eval_fvu_high": 0.1508}
        lines = [{"step": i, "tokens": i, "loss": 1 / i, "seconds": i, "time": "2026-03-01T12:30:30Z"} for i in (1, 2)]
        text = "".join(json.dumps(line | ends) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        keep_evaluation(tmp_path / name, {"model": "m" * 60, "text": ["held/out"]} | evaluated())
    path = report([tmp_path], tmp_path)[0]
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 844})
        page.goto(f"file://{path}")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert faint_now(page) == []
        page.evaluate("document.body.style.color = getComputedStyle(document.body).backgroundColor")
        assert faint_now(page), "the control"
        page.close()


def test_light_and_dark_differ_and_the_choice_stays(opened: Opened) -> None:
    page = opened.go("/")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != light
    assert opened.go("/run").evaluate(colour) != light


def test_a_million_features(browser: Any, result: Path, tmp_path: Path) -> None:
    """Sparse files of the right sizes, with real values for all that lists need and for one latent."""
    latents, chunk, real = 1_000_000, 16_384, 777_777
    small = saetrain.open_features(result)
    found = columns(Slots(*TINY["slots"]), small.rows)
    for key, data in metadata(found, latents, chunk, {}):
        path = tmp_path / "many" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    dice = np.random.default_rng(0)
    whole = {
        "stat/count": dice.integers(0, 99, latents),
        "stat/density": dice.random(latents) ** 4 + 1e-9,
        "stat/max": dice.random(latents, np.float32) + 1,
        "stat/documents": dice.integers(1, 9, latents),
    }
    for name, column in found.items():
        width = int(np.prod(column.shape, dtype=int)) * np.dtype(column.dtype).itemsize
        for number in range(-(-latents // chunk)):
            path = tmp_path / "many" / chunk_key(name, number, len(column.shape) + 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(chunk * width)
                if name in whole:
                    file.write(whole[name][number * chunk : (number + 1) * chunk].astype(column.dtype).tobytes())
                if number == real // chunk:
                    file.seek(real % chunk * width)
                    file.write(np.ascontiguousarray(small.array(name, 4, 5)).tobytes())
    facts = small.facts | {"latents": latents, "alive": int((whole["stat/count"] > 0).sum())}
    many = Features(str(tmp_path / "many"), facts, small.facts["store"], None)
    opened = Opened(browser, Site(many, Labels(tmp_path / "labels.json")))
    page = opened.go(f"/feature/{real}")
    assert page.inner_text("h1") == "Feature 777,777"
    assert page.locator(".example").count() == len(small[4].top(8))
    page = opened.go("/?order=density&falling=1")
    assert page.locator("table.list tbody tr").count() == 100
    page.get_by_text("Show more").click()
    opened.listed(200)
    assert "1,000,000" in page.inner_text(".tiles")
    opened.close()
    assert opened.errors == []
