"""The page in a real Chromium: clicks, keys, a phone's width, light and dark, downloads."""

import csv
import json
import time

import numpy as np
import pytest

from batchproof import report
from batchproof.study import statistics

EVIL = "td3<b onmouseover=alert(1)>"
STEPS = tuple(range(100, 1300, 100))
SEEDS = 6
LONG = 'Long, quoted "name" of an environment that is wide-v1'
ALGOS = [EVIL, "sac", "ddpg"]
SAC = "sac · TEEJJ"  # in the report, after its plan, which differs


@pytest.fixture(scope="module")
def made(tmp_path_factory, training, write_run):
    """The report of three conditions on two tasks, one seed of the first diverged at the end."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    runs, curves = [], {}
    for algo, top in zip(ALGOS, (30.0, 10.0, 20.0), strict=True):
        for env in ("Hop-v5", LONG):
            values = top * np.linspace(0.1, 1, len(STEPS)) + rng.normal(0, 2, (SEEDS, len(STEPS)))
            if algo == EVIL and env == "Hop-v5":
                values[2, -2:] = np.nan
            norm = {"kind": "batch", "placement": "input+post"}
            plan = "TEEJJ" if algo == "sac" else "TETTE"
            record = training(algo, env=env, seeds=range(SEEDS), norm=norm, plan=plan)
            kappa = rng.uniform(0, 1, (SEEDS, len(STEPS)))
            runs.append(
                write_run(folder / f"{len(runs)}", record, steps=STEPS, returns=values, kappa=kappa)
            )
            curves[algo, env] = values
    report.write(runs, folder / "report.html")
    return folder / "report.html", curves


@pytest.fixture
def page(browser, made):
    found = browser.open(made[0])
    yield found
    found.close()


def lines(page, figure="curves"):
    """The drawn lines' names."""
    return page.js(
        f"[...document.getElementById('chart-{figure}').data].filter(t => t.name !== 'band')"
        ".map(t => t.name)"
    )


def drawn(page, figure="curves"):
    """How many traces there are in the picture itself."""
    return page.js(f"document.querySelectorAll('#chart-{figure} .scatterlayer .trace').length")


def order(page, table):
    return page.js(
        f"[...document.querySelectorAll('table[aria-label={table}] tbody th')]"
        ".map(cell => cell.textContent.trim())"
    )


def test_it_opens_without_errors_dialogs_or_connections(page, made):
    asked = [event["request"]["url"] for event in page.seen("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [made[0].as_uri()]
    assert page.seen("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled") == []
    assert page.seen("Page.javascriptDialogOpening") == []
    assert page.js("document.querySelectorAll('b[onmouseover]').length") == 0
    # The page's own policy refuses, not a missing network.
    blocked = page.js(
        "new Promise(done => { document.addEventListener('securitypolicyviolation',"
        " e => done(e.effectiveDirective)); fetch('https://example.org').catch(() => 0); })"
    )
    assert blocked == "connect-src"


def test_all_figures_are_drawn(page):
    assert len(lines(page)) == 3
    assert drawn(page) == 6  # a line and a band each
    for figure in ("final", "profile", "across"):
        assert drawn(page, figure) >= 2
    # What a user wrote shows as text, and a name is not read as markup.
    assert EVIL in page.js("document.querySelector('#toggles').textContent")
    assert EVIL.split()[0] in page.js("document.querySelector('#chart-final').textContent")


def test_a_checkbox_hides_a_condition_in_every_figure(page):
    others = ("profile", "across")
    assert all(SAC in lines(page, figure) for figure in ("curves", *others))
    assert SAC in page.js("document.querySelector('#chart-final').textContent")
    page.click("#toggles input[data-condition='1']")
    page.wait("document.getElementById('chart-curves').data.length === 4")
    assert not any(SAC in lines(page, figure) for figure in ("curves", *others))
    assert drawn(page) == 4
    assert SAC not in page.js("document.querySelector('#chart-final').textContent")
    page.click("#none")
    page.wait("document.getElementById('chart-curves').data.length === 0")
    page.click("#all")
    page.wait("document.getElementById('chart-curves').data.length === 6")


def test_bands_are_those_of_the_statistics(page, made):
    values = made[1]["sac", "Hop-v5"]
    line = f"document.getElementById('chart-curves').data.find(t => t.name === '{SAC}')"
    y, ends = f"{line}.y", f"{line}.customdata"
    assert page.js(y) == pytest.approx(values.mean(axis=0), rel=1e-4)
    assert page.js(ends) == pytest.approx(
        np.stack([values.min(axis=0), values.max(axis=0)], axis=1), rel=1e-4
    )
    page.click("input[value=iqm]")
    page.wait("document.getElementById('caption-curves').textContent.includes('bootstrap')")
    middle, low, high = statistics.iqm_curve(values)
    assert page.js(y) == pytest.approx(middle, rel=1e-3)
    assert page.js(ends) == pytest.approx(np.stack([low, high], axis=1), rel=1e-3)
    page.click("input[value=seeds]")
    page.wait(f"document.getElementById('chart-curves').data.length === {3 * (SEEDS + 1)}")
    # The seed that diverged ends where it did.
    shown = page.js("document.getElementById('chart-curves').data[2].y")
    assert shown[-3:] == [pytest.approx(made[1][EVIL, "Hop-v5"][2, -3], rel=1e-4), None, None]


def test_another_metric_and_another_task(page, made):
    for picker, value in (("metric", "kappa"), ("task", "1")):
        page.js(
            f"(() => {{ const s = document.getElementById('{picker}'); s.value = '{value}';"
            "s.dispatchEvent(new Event('change')); })()"
        )
    page.wait("document.querySelector('#chart-curves .ytitle')?.textContent === 'kappa'")
    top = page.js("Math.max(...document.getElementById('chart-curves').data[1].y)")
    assert 0 < top <= 1
    caption = page.js("document.getElementById('on-final').textContent")
    assert 'Long, quoted "name"' in caption
    assert page.js("document.getElementById('chart-final').data[0].x") == pytest.approx(
        np.concatenate([curves[:, -1] for (_, env), curves in made[1].items() if env != "Hop-v5"]),
        rel=1e-4,
    )


def test_hovering_a_line_says_what_it_is(page):
    x, y = page.js(
        "(() => { const g = document.getElementById('chart-curves');"
        "g.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const r = g.getBoundingClientRect(), l = g._fullLayout, t = g.data[3];"
        "return [r.x + l.xaxis._offset + l.xaxis.d2p(t.x[5]),"
        "        r.y + l.yaxis._offset + l.yaxis.d2p(t.y[5])]; })()"
    )
    page.move(x - 3, y)
    page.move(x, y)
    text = page.wait("document.querySelector('#chart-curves .hoverlayer .hovertext')?.textContent")
    assert "sac" in text
    assert "step 600" in text


def test_a_heading_sorts_its_table(page):
    before = order(page, "Conditions")
    columns = page.js(
        "[...document.querySelectorAll('table[aria-label=Conditions] thead th')]"
        ".map(cell => cell.textContent)"
    )
    head = f"table[aria-label=Conditions] th:nth-child({columns.index('Mean') + 1})"
    values = (
        "[...document.querySelectorAll('table[aria-label=Conditions] tbody tr')]"
        f".map(row => Number(row.cells[{columns.index('Mean')}].dataset.sort))"
    )
    page.click(f"{head} button")
    up = page.js(values)
    assert up == sorted(up)
    assert page.js(f"document.querySelector('{head}').getAttribute('aria-sort')") == "ascending"
    assert order(page, "Conditions") != before
    page.click(f"{head} button")
    assert page.js(values) == sorted(up, reverse=True)
    assert page.js(f"document.querySelector('{head}').getAttribute('aria-sort')") == "descending"
    assert page.js("document.querySelectorAll('[aria-sort]').length") == 1


def downloaded(page, tmp_path, figure, kind):
    page.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click(f"button[data-figure={figure}][data-format={kind}]")
    path = tmp_path / f"{figure}.{kind}"
    deadline = time.monotonic() + 60
    while not path.exists() or list(tmp_path.glob("*.crdownload")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path


def test_the_data_come_down_as_csv(page, made, tmp_path):
    page.click("#toggles input[data-condition='2']")
    text = downloaded(page, tmp_path, "curves", "csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == ["task", "condition", "seed", "step", "return"]
    assert len(rows) == 2 * SEEDS * len(STEPS)  # the hidden condition stays out
    found = {
        (row["condition"].split(" · ")[0], int(row["seed"]), int(row["step"])): row["return"]
        for row in rows
    }
    for name in (EVIL, "sac"):
        for seed, curve in enumerate(made[1][name, "Hop-v5"]):
            said = [found[name, seed, step] for step in STEPS]
            numbers = [float(text) if text else np.nan for text in said]
            assert numbers == pytest.approx(curve.tolist(), rel=1e-5, nan_ok=True)
    page.js(
        "(() => { const s = document.getElementById('task'); s.value = '1';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    text = downloaded(page, tmp_path, "final", "csv").read_text()
    final = list(csv.DictReader(text.splitlines()))
    assert [row["task"] for row in final] == [LONG] * 2 * SEEDS  # commas and quotes survive


@pytest.mark.parametrize("figure", ["curves", "final"])
def test_figures_come_down_as_svg_and_png(page, tmp_path, figure):
    svg = downloaded(page, tmp_path, figure, "svg").read_text()
    assert svg.startswith("<svg")
    assert "sac" in svg  # a picture alone names its lines
    assert "Hop-v5" in svg
    png = downloaded(page, tmp_path, figure, "png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 2200


def test_everything_is_reached_by_keyboard_in_order_with_a_visible_focus(page):
    wanted = page.js(
        "[...document.querySelectorAll('a, select, button, input, summary, .scroll')]"
        ".filter(e => e.type !== 'radio' || e.checked).length"
    )
    page.js(
        "window.seen = []; document.addEventListener('focusin', e => window.seen.push(e.target))"
    )
    for _ in range(wanted + 3):
        page.press("Tab")
        if page.js("document.activeElement === document.body"):
            break
    assert page.js("document.activeElement === document.body"), "the keyboard is trapped"
    found = page.js("new Set(window.seen).size")
    assert found == wanted
    assert page.js(
        "window.seen.slice(1).every((e, i) => window.seen[i].compareDocumentPosition(e)"
        " & Node.DOCUMENT_POSITION_FOLLOWING)"
    )


def test_focus_shows(page):
    for selector in ("#metric", "#all", "#toggles input", "th button", ".scroll", "nav a"):
        page.press("Tab")  # a key was used last, as for who uses no mouse
        page.js(f"document.querySelector('{selector}').focus()")
        style = page.js("getComputedStyle(document.activeElement).outlineStyle")
        assert style not in ("none", ""), selector


def test_keys_toggle_switch_and_sort(page):
    page.js("document.querySelector('#toggles input').focus()")
    page.press(" ")
    page.wait("document.getElementById('chart-curves').data.length === 4")
    page.js("document.querySelector('input[value=range]').focus()")
    page.press("ArrowRight")
    page.wait("document.querySelector('input[value=iqm]').checked")
    page.wait("document.getElementById('caption-curves').textContent.includes('bootstrap')")
    page.js("document.querySelector('table[aria-label=Conditions] th button').focus()")
    page.press("Enter")
    page.wait("document.querySelectorAll('[aria-label=Conditions] [aria-sort=ascending]').length")


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_needs_no_sideways_scrolling(browser, made, width):
    page = browser.open(made[0], width=width, height=800)
    try:
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js("document.getElementById('chart-curves').clientWidth") <= width
        over = page.js(
            "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg'))"
            f".filter(e => e.getBoundingClientRect().right > {width + 1}).map(e => e.outerHTML"
            ".slice(0, 80))"
        )
        assert over == []
        # Tables scroll within themselves.
        assert page.js("document.querySelector('.scroll').scrollWidth") > width
    finally:
        page.close()


def luminance(text):
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first, second):
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_figures_follow_light_and_dark(page):
    def colours():
        return page.js(
            "(() => { const c = (e, p) => getComputedStyle(document.querySelector(e))[p];"
            "return [c('body', 'backgroundColor'), c('#chart-curves .xtick text', 'fill'),"
            " c('#chart-curves .js-line', 'stroke')]; })()"
        )

    light = colours()
    assert light[0] == "rgb(255, 255, 255)"
    dark_scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", features=dark_scheme)
    page.wait(
        "getComputedStyle(document.querySelector('#chart-curves .xtick text')).fill"
        f" !== {json.dumps(light[1])}"
    )
    dark = colours()
    assert luminance(dark[0]) < 0.02
    for ground, text, line in (light, dark):
        assert contrast(ground, text) > 7
        assert contrast(ground, line) > 3
