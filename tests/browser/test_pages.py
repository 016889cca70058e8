"""Pages in headless Chromium, from files and without a network: what a person clicks does what it says."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from run_pages import CULPRIT, LEVELS, PROMPTS, SPIKE, find_clip, make_run, write_log

from wantrain import page
from wantrain.data import DecodeOptions, apply_table, write_review
from wantrain.data.loading.pairs import read_rows
from wantrain.runs.folder import RunFolder
from wantrain.runs.pages.live import RunPage
from wantrain.runs.pages.overview import write_overview
from wantrain.video import write_mp4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with pages; the first has videos, and clips to look at."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("one", 60), ("other", 40)):
        run = make_run(folder / name, steps=steps, videos=name == "one")
        RunPage(RunFolder(run), steps, find_clip).write("finished")
    write_overview(folder)
    return folder


def wait(tab, condition, seconds=15):
    """Until a condition holds in the tab. The page's policy forbids playwright's own way, which compiles text."""
    until = time.monotonic() + seconds
    while not tab.evaluate(condition):
        assert time.monotonic() < until, condition
        tab.wait_for_timeout(50)


TIMES = "[...document.querySelectorAll('video')].map(v => [v.src.split('/').pop(), v.currentTime, v.readyState])"


def test_slider_moves_all_videos(show, runs):
    """The step slider and the arrow keys put every row to one step, and the time slider all videos to one time."""
    tab = show(runs / "one" / "index.html")
    wait(tab, f"{TIMES}.filter(([,, ready]) => ready >= 2).length === 4")
    assert sorted(name for name, *_ in tab.evaluate(TIMES)) == sorted(
        f"step_{step:06d}_{number}.mp4" for step in (0, 60) for number in (0, 1)
    )
    tab.click("[data-play]")
    tab.locator("[data-time]").fill("500")
    wait(tab, f"{TIMES}.every(([, at]) => Math.abs(at - {33 / 16 / 2}) < 0.04)")
    tab.locator("#step-slider").fill("1")
    wait(tab, f"{TIMES}.filter(([name]) => name.startsWith('step_000030')).length === 2")
    wait(tab, f"{TIMES}.length === 4 && {TIMES}.every(([, at]) => Math.abs(at - {33 / 16 / 2}) < 0.04)")
    assert tab.locator("#sample-step").inner_text() == "Step 30"
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#sample-step").inner_text() == "Step 60"
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    wait(tab, "document.querySelector('#sample-step').textContent === 'Step 0'")
    assert tab.title() == "one" and tab.locator(".sample .text p.caption").all_inner_texts() == PROMPTS


def test_heat_map_cells(show, runs):
    """The heat map draws a cell for each bin of noise and each reading of the log."""
    tab = show(runs / "one" / "index.html")
    chart = tab.locator("#chart-heat-low_noise .uplot")
    assert int(chart.get_attribute("data-cells")) == len(LEVELS) * 6
    chart.scroll_into_view_if_needed()
    chart.locator(".u-over").hover()
    at = tab.locator("#chart-heat-low_noise .scale .at")
    assert "sigma" in at.inner_text() and "%" in at.inner_text()
    picture = "document.querySelector('#chart-heat-low_noise canvas').toDataURL()"
    before = tab.evaluate(picture)
    tab.locator("#heat").select_option("loss")
    wait(tab, f"{picture} !== {json.dumps(before)}")


def test_spike_shows_its_clips(show, runs):
    """A click near a spike shows that step, its clips in the order of their losses, and their noise levels."""
    tab = show(runs / "one" / "index.html", scheme="dark")
    over = tab.locator("#chart-usual .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    over.click(position={"x": box["width"] * (SPIKE - 1) / 60 + 4, "y": box["height"] / 2})
    assert tab.locator("#inspected").inner_text() == f"Step {SPIKE}"
    first = tab.locator("#inspector .clip-list figure").first
    assert "loss 40.0000 at sigma 0.500" in first.inner_text() and f"caption of {CULPRIT}" in first.inner_text()
    assert first.locator("img").evaluate("image => image.complete && image.naturalWidth > 0")
    tab.keyboard.press("Escape")
    assert tab.locator("#inspector").is_hidden()
    tab.locator("tr.pick").first.click()
    assert tab.locator("#inspected").inner_text() == f"Step {SPIKE}"


def test_page_follows_run(show, tmp_path):
    """While a run trains its open page takes in what is new, without losing its place, and says how the run ended."""
    run = make_run(tmp_path / "r", videos=True)
    live = RunPage(RunFolder(run), 100, find_clip)
    live.write("running")
    tab = show(run / "index.html")
    assert "Step 60 of 100" in tab.locator("#status").inner_text()
    tab.locator("#step-slider").fill("1")
    tab.evaluate("window.scrollTo(0, 500); window.mark = 1")
    write_log(run / "metrics.jsonl.new", 100)
    (run / "metrics.jsonl.new").replace(run / "metrics.jsonl")
    live.write("ended")
    tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    wait(tab, "document.querySelector('#state').textContent === 'finished'")
    assert "Step 100 of 100" in tab.locator("#status").inner_text()
    assert tab.evaluate("[window.mark, window.scrollY]") == [1, 500], "the tab was not loaded anew"
    assert tab.locator("#sample-step").inner_text() == "Step 30"
    assert tab.locator("iframe").count() == 0
    assert int(tab.locator("#chart-heat-low_noise .uplot").get_attribute("data-cells")) == len(LEVELS) * 10


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_widths(width, scheme, show, runs):
    """No page is wider than its window, on a phone or a desktop, and text stands out from what is behind it."""
    for path in (runs / "one" / "index.html", runs / "index.html"):
        tab = show(path, width=width, scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        colours = tab.evaluate(
            "['--ink', '--quiet', '--surface'].map(name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
        )
        ink, quiet, surface = map(luminance, colours)
        assert contrast(ink, surface) >= 7 and contrast(quiet, surface) >= 4.5


def luminance(colour):
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_comparison(show, runs):
    """The page of all runs overlays the ticked ones, by steps or by samples."""
    tab = show(runs / "index.html")
    labels = tab.locator("#chart-loss .u-legend .u-label")
    assert set(labels.all_inner_texts()) == {"step", "one", "other"}
    tab.get_by_label("Draw other").uncheck()
    assert set(labels.all_inner_texts()) == {"step", "one"}
    tab.locator("#x-axis").select_option("samples")
    assert "samples" in labels.all_inner_texts()
    tab.locator("#find").fill("oth")
    assert tab.locator("#runs tbody tr").count() == 1
    tab.locator("#find").fill("")
    tab.locator("#runs th", has_text="Lowest validation").click()
    assert tab.locator("#runs tbody tr a").all_inner_texts() == ["one", "other"]
    tab.get_by_role("link", name="one").click()
    wait(tab, "document.querySelector('#status')?.textContent.startsWith('Step 60 of 60')")


def test_report_table(show, tmp_path):
    """The table of a data report is sorted by its heads and filtered by words, bucket and tag."""
    clips = [
        {"captions": [f"clip {i}"], "length": 10 - i, "bucket": f"{1 + i % 2}x64x64", "frames": 1 + i % 2,
         "tags": ['a "b"'] if i == 3 else [], "weight": 1, "source": f"f{i}.mp4", "start": 0.0, "strip": "", "problem": ""}
        for i in range(10)
    ]  # fmt: skip
    document = page.render(
        "report", "data", totals=[("clips", 10)], more_counts=[], settings=[], rejected=0, reject_reasons={}, named=[],
        named_title="", sizes={"1x64x64": 5, "2x64x64": 5}, lengths={}, tags={'a "b"': 1}, size_name="bucket",
        size_label="Bucket", captions={}, caption_title="", caption_unit="Words", caption_note="", clips_note="", clips=clips,
    )  # fmt: skip
    (tmp_path / "report.html").write_text(document, encoding="utf-8")
    tab = show(tmp_path / "report.html")
    shown = (
        "[...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden).map(row => row.dataset.source)"
    )
    tab.locator("th", has_text="Words").click()
    assert tab.evaluate(shown) == [f"f{i}.mp4" for i in reversed(range(10))]
    tab.locator("th", has_text="Words").click()
    tab.locator("#filter-bucket").select_option("2x64x64")
    assert tab.evaluate(shown) == ["f1.mp4", "f3.mp4", "f5.mp4", "f7.mp4", "f9.mp4"]
    tab.locator('[data-filter="tag"]').click()
    assert tab.evaluate(shown) == ["f3.mp4"] and tab.locator("#count").inner_text() == "1 of 10 clips"
    tab.locator("#find").fill("clip 4")
    assert tab.locator("#none").is_visible()


def test_captions_edited(show, tmp_path):
    """Captions are edited in the page, and the table that it saves is what caption.py writes back."""
    footage = tmp_path / "footage"
    footage.mkdir()
    for name, caption in (("a", 'one, "quoted"'), ("b", "two 猫"), ("c", "")):
        Image.new("RGB", (32, 24), "green").save(footage / f"{name}.png")
        (footage / f"{name}.txt").write_text(caption, encoding="utf-8")
    write_review(footage, lambda caption: len(caption.split()), DecodeOptions(1))
    tab = show(footage / "captions.html")
    assert tab.locator("#save").is_disabled() and tab.locator("#count").inner_text() == "3 files"
    tab.locator("textarea").nth(1).fill('edited, "here"\nin two lines')
    tab.locator("th", has_text="File").click()
    tab.locator("th", has_text="File").click()
    tab.locator("#filter-by").select_option("edited")
    assert tab.locator("#count").inner_text() == "1 of 3 files"
    with tab.expect_download() as download:
        tab.locator("#save").click()
    download.value.save_as(tmp_path / "saved.csv")
    assert apply_table(footage, tmp_path / "saved.csv") == ["b.png"]
    assert (footage / "b.txt").read_text(encoding="utf-8") == 'edited, "here" in two lines\n'
    assert (footage / "a.txt").read_text(encoding="utf-8") == 'one, "quoted"'


def test_data_is_whole(runs):
    """What a page was given is what its scripts read: JSON that survives the page, whatever text is in it."""
    data = page.data_of((runs / "one" / "index.html").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in data["previews"]["rows"]] == PROMPTS
    assert json.loads(json.dumps(data)) == data


def test_pairs_chosen(show, tmp_path):
    """A click chooses, another takes it back, arrows choose and go on; what is saved and copied is data.pairs= table."""
    pairs = [{"prompt": f'a "{name}" 猫', "files": [f"{name}1.mp4", f"{name}2.mp4"]} for name in "abc"]
    for name in (name for pair in pairs for name in pair["files"]):
        write_mp4(tmp_path / name, np.zeros((5, 32, 32, 3), np.uint8), 8)
    document = page.render("pairs", "Pairs", pairs=pairs, table="pairs.csv", folder=str(tmp_path))
    (tmp_path / "pairs.html").write_text(document, encoding="utf-8")
    tab = show(tmp_path / "pairs.html")
    assert tab.locator("#save").is_disabled() and tab.locator("#count").inner_text() == "0 of 3 chosen"
    choices = tab.locator(".choice")
    choices.nth(0).click()
    choices.nth(2).click()
    choices.nth(2).click()
    assert tab.locator("#count").inner_text() == "1 of 3 chosen"
    tab.locator(".pair").nth(1).focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#count").inner_text() == "3 of 3 chosen"
    with tab.expect_download() as download:
        tab.locator("#save").click()
    download.value.save_as(tmp_path / "pairs.csv")
    rows = read_rows(tmp_path / "pairs.csv")
    assert [row[1:] for row in rows] == [("a1.mp4", "a2.mp4"), ("b2.mp4", "b1.mp4"), ("c1.mp4", "c2.mp4")]
    tab.locator("#copy").click()
    assert '"b2.mp4","b1.mp4","a ""b"" 猫"' in tab.locator("#text").input_value()
