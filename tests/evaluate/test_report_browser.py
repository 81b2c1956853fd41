"""The report in a real browser, opened from disk: what is seen, heard from the keyboard, played and asked for."""

import shutil
import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from tad.annotations import Truth
from tad.evaluate import average_recall, bootstrap_map, detection_map, diagnose, pr_curves
from tad.evaluate.matching import average_precision, match
from tad.evaluate.report import build_report, make_proxies
from tad.synth import make_video

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
EVIL = "<img src=x onerror=alert(1)>\"'&amp;</script>"

TRUTH = [
    ("clip one", 0.5, 1.5, "run"),
    ("clip one", 2.0, 3.0, EVIL),
    ("clip one", 3.2, 3.6, "run"),
    ("gone", 10.0, 20.0, "run"),
]
FOUND = [
    ("clip one", 0.5, 1.4, "run", 0.9),
    ("clip one", 2.1, 3.0, EVIL, 0.8),
    ("clip one", 0.6, 1.5, "run", 0.3),
    ("clip one", 2.0, 3.0, "run", 0.2),
    ("gone", 40.0, 45.0, EVIL, 0.25),
    ("elsewhere", 1.0, 2.0, "swim", 0.1),
]


def tables():
    segments = pd.DataFrame(TRUTH, columns=["video", "start_s", "end_s", "label"]).assign(subset="test")
    videos = pd.DataFrame(
        {"video": ["clip one", "gone", "quiet"], "subset": "test", "duration_s": [4.0, 60.0, 30.0], "fps": 10.0}
    )
    found = pd.DataFrame(FOUND, columns=["video", "start_s", "end_s", "label", "score"])
    return Truth(videos, segments), found


def everything(truth, found):
    """All that a report can hold."""
    return {
        "truth": truth,
        "predictions": found,
        "metrics": detection_map(truth, found).to_dict(),
        "recall": average_recall(truth, found),
        "curves": pr_curves(truth, found, 0.5),
        "diagnosis": diagnose(truth, found, tiou=0.5).to_dict(),
        "intervals": bootstrap_map(truth, found, samples=5).to_dict(),
        "training": [{"epoch": e, "lr": 0.1, "loss": 1 / e, "average_map": None if e % 2 else 0.1 * e} for e in (1, 2)],
    }


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser on PATH: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    made = make_video(root / "one #1.mp4", duration_s=4.0, seed=2, size=(48, 64), fps=10.0)
    copies, failures = make_proxies({"clip one": made.path}, root / "copies")
    assert not failures
    files = {**copies, "gone": root / "gone.mp4", "elsewhere": made.path}  # OpenCV's MPEG-4 Part 2: no browser's
    return build_report(**everything(*tables()), out=root / "report.html", title=EVIL, videos=files)


class Open:
    """A page that notes what must not happen: errors, and requests that are not to files."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri())
        self.page.wait_for_function("() => globalThis.tadReport")

    def _said(self, message):
        missing = "ERR_FILE_NOT_FOUND" in message.text  # of the video that is not there
        if message.type in ("error", "warning") and not missing:
            self.trouble.append(message.text)

    def _asked(self, request):
        if not request.url.startswith(("file:", "data:")):
            self.trouble.append(request.url)

    def __getattr__(self, name):
        return getattr(self.page, name)

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def names(self):
        """The videos in the list, from above."""
        items = "[...document.querySelectorAll('.item')].sort((a, b) => a.offsetTop - b.offsetTop)"
        return self.page.evaluate(f"{items}.map(item => item.title)")

    def set(self, selector, value):
        script = "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', { bubbles: true })); }"
        self.page.locator(selector).evaluate(script, value)
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture
def opened(browser, report, request):
    page = Open(browser, report, **getattr(request, "param", {}))
    yield page
    trouble = page.trouble
    page.context.close()
    assert trouble == []


def test_the_scores_are_shown_and_hostile_names_are_text(opened):
    assert opened.text("h1") == EVIL
    assert opened.title() == EVIL
    assert opened.locator("img").count() == 0
    average = detection_map(*tables()).average
    assert f"{100 * average:.2f}" in opened.text(".tiles")
    for heading in ("mAP over tIoU", "Precision over recall", "Recall of proposals", "What predictions are"):
        assert opened.get_by_role("heading", name=heading).count() == 1
    assert opened.locator("svg path[d^=M]").count() >= 6
    assert opened.locator("#classes tbody tr").count() == 4  # all, two of the truth, one only predicted
    opened.get_by_role("button", name="true", exact=True).click()
    assert opened.locator("#classes tbody tr td:first-child").all_inner_texts() == ["all", "run", EVIL, "swim"]
    opened.locator("#classes tbody tr", has_text="run").locator("td").nth(1).click()
    assert "run" in opened.text("#overview .card:has(h2:text-is('Precision over recall')) p")


def test_a_class_leads_to_its_videos(opened):
    opened.locator("#classes").get_by_role("button", name=EVIL).click()
    assert opened.locator("#videos").is_visible()
    assert sorted(opened.names()) == ["clip one"]  # what was predicted in the other lies below the least score
    opened.set("#score", "0")
    assert sorted(opened.names()) == ["clip one", "gone"]
    assert all(
        item["label"] == opened.evaluate("tadReport.state.label") for item in opened.evaluate("tadReport.view.items")
    )


def test_search_order_and_list(opened):
    opened.keyboard.press("v")
    assert opened.names() == ["gone", "clip one", "elsewhere", "quiet"]  # worst AP first, unknown last
    opened.select_option("#sort", "id")
    assert opened.names() == ["clip one", "elsewhere", "gone", "quiet"]
    opened.keyboard.press("Escape")
    opened.locator("#list").focus()
    opened.keyboard.press("/")
    opened.keyboard.type("CLIP")
    assert opened.names() == ["clip one"]
    opened.keyboard.press("Enter")
    assert opened.text("#video-name") == "clip one"
    assert opened.locator("#list [aria-selected=true]").get_attribute("title") == "clip one"
    assert "#video=clip%20one" in opened.url


def test_the_least_score_and_the_overlap(opened):
    opened.keyboard.press("v")
    opened.locator(".item[title='clip one']").click()
    assert opened.evaluate("tadReport.state.cut") == 0.8  # the best F1: two right, none false
    assert opened.locator("#segments tbody tr").count() == 5
    opened.set("#score", "0.25")
    assert opened.locator("#segments tbody tr").count() == 6
    assert "found before by a higher score" in opened.text("#segments")
    opened.set("#score-slider", "0")
    assert opened.locator("#segments tbody tr").count() == 7
    assert "wrong class" in opened.text("#segments")
    assert opened.text("#score-share") == "6 of 6"
    opened.set("#score-slider", "1000")
    assert opened.text("#score-share") == "1 of 6"
    opened.get_by_role("button", name="best F1").click()
    opened.select_option("#tiou", "0.9")
    opened.evaluate("new Promise(done => requestAnimationFrame(done))")
    assert opened.evaluate("tadReport.tally(0)") == {"truth": 3, "found": 2, "shown": 2, "wrong": 0}
    assert opened.evaluate("(() => { tadReport.state.tiou = 0.95; return tadReport.tally(0).found; })()") == 0


def test_a_segment_is_played_and_looped(opened):
    opened.keyboard.press("v")
    opened.locator(".item[title='clip one']").click()
    opened.wait_for_function("() => tadReport.player.there")
    box = opened.locator("#rows-canvas").bounding_box()
    target = opened.evaluate(
        """(() => {
            const { view } = tadReport, item = view.items.find(one => one.kind === "predicted" && one.start === 500);
            const left = Math.min(170, Math.max(90, view.width * 0.14));
            const share = (900 - view.from) / (view.to - view.from);
            return [left + share * (view.width - left - 10), item.y + item.tall / 2];
        })()"""
    )
    opened.mouse.move(box["x"] + target[0], box["y"] + target[1])
    assert "0:00.50 – 0:01.40" in opened.text("#tip")
    assert "score 0.9" in opened.text("#tip")
    opened.mouse.click(box["x"] + target[0], box["y"] + target[1])
    opened.wait_for_function("() => !document.querySelector('video').paused && tadReport.player.ms() > 600")
    seen = []
    end = time.monotonic() + 2.2
    while time.monotonic() < end:
        seen.append(opened.evaluate("tadReport.player.ms()"))
        opened.wait_for_timeout(40)
    assert min(seen) >= 400
    assert max(seen) < 1800
    assert any(later < earlier - 300 for earlier, later in pairwise(seen))  # it began again
    head = opened.locator("#playhead").bounding_box()["x"]
    opened.locator("#segments tbody tr").nth(4).click()
    opened.wait_for_timeout(200)
    assert opened.locator("#playhead").bounding_box()["x"] > head + 100
    assert opened.evaluate("tadReport.player.ms()") >= 2900


def test_the_keyboard_does_everything(opened):
    at, press = (lambda: opened.evaluate("tadReport.player.ms()")), opened.keyboard.press
    press("v")
    press("n")
    assert opened.text("#video-name") == "clip one"
    opened.wait_for_function("() => tadReport.player.there")
    press("n")
    assert opened.text("#video-name") == "elsewhere"
    press("p")
    opened.wait_for_function("() => tadReport.player.there")
    press("j")
    assert at() == 500
    press("j")
    press("j")
    assert at() == pytest.approx(2000, abs=1)
    assert "truth" in opened.text("#said")
    press("k")
    assert at() == 500
    press("ArrowRight")
    assert at() == 1500
    press("Shift+ArrowLeft")
    assert at() == pytest.approx(1400, abs=1)
    press("Escape")
    assert opened.evaluate("tadReport.state.segment") is None
    press(" ")
    opened.wait_for_function("() => !document.querySelector('video').paused")
    press(" ")
    opened.wait_for_function("() => document.querySelector('video').paused")
    press("+")
    assert opened.evaluate("tadReport.view.to - tadReport.view.from") < 3000
    press("0")
    assert opened.evaluate("tadReport.view.from") == 0
    cut = opened.evaluate("tadReport.state.cut")
    for _ in range(12):
        press("[")
    assert opened.evaluate("tadReport.state.cut") < cut
    press("?")
    assert opened.locator("#help").is_visible()
    press("Escape")
    assert not opened.locator("#help").is_visible()
    press("l")
    assert opened.get_by_role("button", name="loop").get_attribute("aria-pressed") == "false"
    press("s")
    assert opened.locator("#overview").is_visible()


def test_a_video_that_is_not_there_is_said_and_the_rest_works(opened):
    opened.keyboard.press("v")
    opened.locator(".item[title='gone']").click()
    opened.wait_for_function("() => !document.getElementById('no-video').hidden")
    assert "not there" in opened.text("#no-video")
    assert "gone.mp4" in opened.text("#no-video")
    opened.keyboard.press("j")
    assert opened.evaluate("tadReport.player.ms()") == 10000
    assert "0:10.0" in opened.text("#clock")
    opened.keyboard.press(" ")
    assert "no video" in opened.text("#said")
    opened.locator(".item[title='quiet']").click()
    assert "no file is known" in opened.text("#no-video")
    opened.locator(".item[title='elsewhere']").click()
    assert "not in the annotation" in opened.text("#video-facts")
    opened.wait_for_function("() => !document.getElementById('no-video').hidden")
    assert "cannot play" in opened.text("#no-video")
    assert "codec" in opened.text("#no-video")


@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}], indirect=True)
def test_dark_and_light(opened):
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    assert opened.evaluate(ground) < 120
    opened.keyboard.press("t")
    assert opened.evaluate(ground) > 600
    opened.reload()
    opened.wait_for_function("() => globalThis.tadReport")
    assert opened.evaluate(ground) > 600  # it is remembered
    opened.keyboard.press("t")
    assert opened.evaluate(ground) < 120
    opened.keyboard.press("t")
    opened.emulate_media(color_scheme="light")
    opened.wait_for_function(f"() => {ground} > 600")  # the system's again


def test_all_is_reached_with_the_tab_key(opened):
    opened.keyboard.press("v")
    wanted = {"search", "sort", "list", "score", "score-slider", "best-f1", "tiou", "class", "play", "loop", "speed"}
    wanted |= {"segments", "timeline", "theme", "help-open"}
    reached = set()
    for _ in range(40):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.id"))
    assert wanted <= reached
    unnamed = """[...document.querySelectorAll("button, input, select, [role=listbox], [role=img]")]
        .filter(one => !one.getAttribute("aria-label") && !one.textContent.trim() && !one.closest("label"))
        .map(one => one.outerHTML)"""
    assert opened.evaluate(unnamed) == []


def test_the_page_finds_what_the_evaluator_finds(opened):
    """Ties in overlap and score, zero lengths, inverted segments: on a grid of whole milliseconds these are exact."""
    random = np.random.default_rng(3)
    compare = """({ truth, found, tiou }) => Array.from(tadReport.match(truth, found, tiou))"""
    for case in range(30):
        n, m = int(random.integers(0, 60)), int(random.integers(0, 20))
        truth = np.stack((random.integers(0, 12, m), random.integers(0, 6, m), random.integers(0, 3, m)), 1)
        found = np.stack((random.integers(0, 12, n), random.integers(-1, 6, n), random.integers(0, 3, n)), 1)
        tiou = (0.1, 0.5, 1.0)[case % 3]
        expected = match(
            truth[:, 2],
            np.stack((truth[:, 0], truth[:, 0] + truth[:, 1]), 1).astype(float),
            found[:, 2],
            np.stack((found[:, 0], found[:, 0] + found[:, 1]), 1).astype(float),
            np.zeros(n),
            (tiou,),
        )[0]
        given = {"truth": truth.ravel().tolist(), "found": found.ravel().tolist(), "tiou": tiou}
        assert opened.evaluate(compare, given) == expected.tolist(), case


def random_tables(videos, predictions, classes, seed=0):
    """Truth, and predictions of which some are jittered true segments."""
    random = np.random.default_rng(seed)
    ids = np.array([f"video_{k:05d}" for k in range(videos)])
    n = 10 * videos
    truth = pd.DataFrame({"video": random.choice(ids, n), "start_s": random.uniform(0, 500, n)})
    truth["end_s"] = truth["start_s"] + random.exponential(10, n)
    truth["label"] = random.choice([f"class {k}" for k in range(classes)], n)
    found = truth.iloc[random.integers(0, n, predictions)].reset_index(drop=True)
    length = found["end_s"] - found["start_s"]
    found["start_s"] += random.normal(0, 0.3, predictions) * length
    found["end_s"] = found[["start_s", "end_s"]].max(axis=1)
    found["score"] = random.beta(1, 4, predictions)
    return truth, found


def test_ap_and_counts_of_videos_are_those_of_the_evaluator(browser, tmp_path):
    truth, found = random_tables(12, 600, 4, seed=1)
    page = Open(browser, build_report(truth=truth, predictions=found, out=tmp_path / "report.html"))
    page.keyboard.press("v")
    page.set("#score", "0.2")
    for v, video in enumerate(page.evaluate("tadReport.data.videos.id")):
        mine, theirs = (
            truth[truth["video"] == video],
            found[found["video"] == video].sort_values("score", ascending=False),
        )
        groups = {label: k for k, label in enumerate(sorted(truth["label"].unique()))}
        taken = match(
            mine["label"].map(groups).to_numpy(),
            mine[["start_s", "end_s"]].to_numpy(),
            theirs["label"].map(groups).to_numpy(),
            theirs[["start_s", "end_s"]].to_numpy(),
            theirs["score"].to_numpy(),
            (0.5,),
        )
        ap = average_precision(taken >= 0, len(mine))[0]
        assert page.evaluate(f"tadReport.matches().ap[{v}]") == pytest.approx(ap, abs=1e-12)
        kept = theirs["score"].to_numpy() >= 0.2
        right = int((taken[0][kept] >= 0).sum())
        expected = {"truth": len(mine), "found": right, "shown": int(kept.sum()), "wrong": int(kept.sum()) - right}
        assert page.evaluate(f"tadReport.tally({v})") == expected
    assert page.trouble == []
    page.context.close()


def test_nothing_at_all_is_a_page_too(browser, tmp_path):
    none = pd.DataFrame({"video": [], "start_s": [], "end_s": [], "label": [], "score": []})
    page = Open(browser, build_report(truth=None, predictions=none, out=tmp_path / "report.html"))
    for key in ("v", "j", "n", " ", "+", "t", "s"):
        page.keyboard.press(key)
    page.keyboard.press("v")
    assert "There is no video" in page.text("#videos")
    assert page.trouble == []
    page.context.close()


def test_predictions_without_truth(browser, tmp_path):
    _, found = random_tables(3, 40, 2)
    page = Open(browser, build_report(truth=None, predictions=found, out=tmp_path / "report.html"))
    assert page.locator("#videos").is_visible()
    assert "false" not in page.text(".list")
    assert page.locator("#segments tbody tr").count() > 0
    assert page.trouble == []
    page.context.close()


@pytest.mark.slow
def test_500_videos_and_50_000_predictions(browser, tmp_path, capsys):
    truth, found = random_tables(500, 50_000, 200)
    path = build_report(**everything(truth, found), out=tmp_path / "report.html")
    assert path.stat().st_size < 6e6
    begun = time.perf_counter()
    page = Open(browser, path)
    shown = time.perf_counter() - begun
    page.keyboard.press("v")
    page.wait_for_selector(".item")
    assert page.locator(".item").count() < 40  # only those that are seen
    page.locator("#list").evaluate("list => { list.scrollTop = 1e9; }")
    page.wait_for_timeout(100)
    assert page.locator(".item").last.get_attribute("aria-posinset") == "500"
    begun = time.perf_counter()
    page.set("#score-slider", "100")
    moved = time.perf_counter() - begun
    assert page.trouble == []
    page.context.close()
    with capsys.disabled():
        print(f"\n{path.stat().st_size / 1e6:.1f} MB, open after {shown:.2f} s, slider {moved:.2f} s")
