"""The pages of runs: what they say equals the log, in bounded size, while it grows and after it was cut back."""

import itertools
import json

import numpy as np
import pytest
import torch
from run_pages import CULPRIT, SPIKE, find_clip, make_run, write_log

from wantrain import page
from wantrain.data.loading.views import false_colours, view_of
from wantrain.runs.folder import RunFolder
from wantrain.runs.pages import content, live, log, overview
from wantrain.runs.pages.bins import Bins
from wantrain.runs.pages.live import RunPage
from wantrain.runs.pages.log import RunLog, Tail


@pytest.mark.parametrize("steps", [7, 8, 9, 100, 1000])
def test_bins_exact(steps):
    """However many steps there are, the bins' means, largest and last values are those of their steps."""
    bins, values = Bins(limit=8), np.random.default_rng(steps).normal(size=steps)
    for step, value in enumerate(values):
        bins.at(step).add("x", float(value))
    found = bins.sorted()
    assert len(found) <= 8 and sum(each.tallies["x"].count for each in found) == steps
    first = 0
    for each in found:
        own = values[first : each.step + 1]
        tally = each.tallies["x"]
        assert tally.mean == pytest.approx(own.mean()) and tally.largest == own.max() and tally.last == own[-1]
        first = each.step + 1
    assert first == steps


def logged(path, expert="low_noise"):
    found = RunLog(expert)
    for row in Tail(path).rows():
        found.add(row)
    return found


def test_log_is_followed(tmp_path):
    """New lines are read once, a half line when it is whole, and a file that was cut back anew."""
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert not tail.was_replaced() and list(tail.rows()) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert not tail.was_replaced() and [row["step"] for row in tail.rows()] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\nnot json\n{"step": 4}\n')
    assert not tail.was_replaced() and [row["step"] for row in tail.rows()] == [3, 4]
    path.with_name("new").write_text('{"step": 1}\n')
    path.with_name("new").replace(path)
    assert tail.was_replaced() and [row["step"] for row in tail.rows()] == [1]


def test_content_equals_log(tmp_path):
    """The page's columns are the log's values, its heat map has each reading, and the spike has its clips."""
    run = make_run(tmp_path / "r")
    found = page.data_of(RunPage(RunFolder(run), 60, find_clip).write("running").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    own = found["of_expert"]["low_noise"]
    assert found["x"] == [row["step"] for row in rows] and found["width"] == 1
    for key in ("loss", "grad_norm", "lr", "times_usual"):
        assert own[key] == pytest.approx([row[key] for row in rows], rel=1e-4), key
    assert found["of_run"]["samples"] == [row["samples"] for row in rows]
    assert np.shape(found["heat"]["low_noise"]["loss"]) == (4, 6)
    assert [row["step"] for row in found["validation"]["low_noise"]] == [0, 20, 40, 60]
    assert found["unusual"][0] == [SPIKE, "low_noise", 14.0]
    assert found["picks"][str(SPIKE)]["clips"][0] == [CULPRIT, 0.5, 40.0]
    assert found["clips"][CULPRIT]["caption"] == f"caption of {CULPRIT}"
    assert found["records"][0]["step"] == SPIKE and found["state"] == "running"


def test_pair(tmp_path):
    """A pair has a curve, a heat map and a validation for each expert."""
    names = ("high_noise", "low_noise")
    run = make_run(tmp_path / "r", experts=names)
    found = page.data_of(RunPage(RunFolder(run), 60).write("running").read_text(encoding="utf-8"))
    assert sorted(found["experts"]) == sorted(found["heat"]) == sorted(found["validation"]) == sorted(names)
    losses = [found["of_expert"][name]["loss"] for name in names]
    assert all((one is None) != (other is None) for one, other in zip(*losses, strict=True))
    assert found["clips"] == {}, "no data to look at"


def test_bounded(tmp_path, monkeypatch):
    """A long run's page is no longer than that of a short one, and it keeps the spike."""
    monkeypatch.setattr(log, "POINTS", 50)
    write_log(tmp_path / "metrics.jsonl", 1000)
    found = logged(tmp_path / "metrics.jsonl")
    assert len(found.steps.sorted()) <= 50 and found.last_step == 1000
    assert SPIKE in {each.worst["low_noise"].step for each in found.steps.sorted()}
    assert len(found.picked) <= 4 * log.UNUSUAL and found.picked[SPIKE].clips[0][0] == CULPRIT


def test_hard_clips(tmp_path):
    """Clips are compared with others at the same noise, so a clip that is seen at high losses only is not hard."""
    rng, rows = np.random.default_rng(0), []
    for step in range(1, 400):
        clips = []
        for clip in range(6):
            sigma = float(rng.uniform(0, 0.5) if clip < 3 else rng.uniform(0.5, 1))
            usual = 1.0 if sigma < 0.5 else 0.1
            clips.append([f"c{clip}", sigma, usual * (2.0 if clip == 5 else 1.0) * float(rng.uniform(0.9, 1.1))])
        rows.append({"step": step, "loss": 1.0, "clips": clips})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hard = content.hard_clips(logged(tmp_path / "m.jsonl"))
    assert [clip for clip, *_ in hard] == ["c5"] and hard[0][1] == pytest.approx(1.6, abs=0.3) and hard[0][2] == 399


def test_states(tmp_path, monkeypatch):
    """A run is running, then finished or stopped; an error is named; a page that fails is said and ends nothing."""
    run = make_run(tmp_path / "r")
    index = run / "index.html"

    def state():
        data = page.data_of(index.read_text(encoding="utf-8"))
        return data["state"], data["message"]

    with RunPage(RunFolder(run), 60) as finished:
        finished.refresh()
        assert state() == ("running", "")
    assert state() == ("finished", "")
    with RunPage(RunFolder(run), 61):
        pass
    assert state() == ("stopped", "")
    with pytest.raises(ValueError), RunPage(RunFolder(run), 61):
        raise ValueError("<b>out of memory\nmore")
    assert state() == ("failed", "<b>out of memory")
    said = []
    monkeypatch.setattr(live, "say", said.append)
    monkeypatch.setattr(live.page, "render", lambda *_, **__: 1 / 0)
    with RunPage(RunFolder(run), 60) as broken:
        broken.refresh()
        broken.refresh(now=True)
    assert len(said) == 1 and "ZeroDivisionError" in said[0]


def test_full_disk(tmp_path, monkeypatch):
    """A page that the disk refuses is said once and written when there is room again."""
    run, said = make_run(tmp_path / "r"), []
    monkeypatch.setattr(live, "say", said.append)
    with monkeypatch.context() as full, RunPage(RunFolder(run), 60) as run_page:
        full.setattr(live, "write_atomically", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        run_page.refresh(now=True)
        run_page.refresh(now=True)
        assert len(said) == 1 and "No space left" in said[0] and not (run / "index.html").exists()
        full.undo()
        run_page.refresh(now=True)
        assert (run / "index.html").is_file()


def test_seldom_written(tmp_path):
    """Writing a page takes at most a hundredth of the time: the next one waits a hundred times as long as it took."""
    now = [0.0]
    run = RunPage(RunFolder(make_run(tmp_path / "r")), 60, clock=lambda: now[0])
    written = []

    def write(state, message=""):
        written.append(now[0])
        now[0] += 2.0

    run.write = write
    for second in range(0, 1000, 5):
        now[0] = max(now[0], second)
        run.refresh()
    assert len(written) == 5 and all(b - a >= 202 for a, b in itertools.pairwise(written))


def test_overview(tmp_path):
    """The page of all runs has each run's curves and its lowest validation, from the runs' own pages."""
    for name, steps in (("a", 60), ("b", 40)):
        RunPage(RunFolder(make_run(tmp_path / name, steps=steps)), steps).write("finished")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "index.html").write_text("<html>another page</html>")
    data = page.data_of(overview.write_overview(tmp_path).read_text(encoding="utf-8"))
    runs = {run["name"]: run for run in data["runs"]}
    assert sorted(runs) == ["a", "b"]
    assert runs["a"]["best"]["low_noise"] == {"step": 60, "loss": 0.24, "change": -0.06, "verdict": "better"}
    curve = runs["b"]["curves"]["low_noise"]
    assert len(curve["x"]) == len(curve["loss"]) == len(curve["samples"]) == 40
    assert curve["validation"][0] == [0, 0.3]


def test_pictures_bounded():
    """A write of the page makes a few pictures only; a clip that cannot be read has none."""
    asked = []

    def find(name):
        asked.append(name)
        if name == "clip-1":
            raise ValueError("damaged")
        return find_clip(name)

    pictures = content.Pictures(find, page.data_uri)
    names = [f"clip-{i}" for i in range(10)]
    assert list(pictures.of(names, 4)) == ["clip-0", "clip-2", "clip-3"]
    assert len(pictures.of(names, 100)) == 9 and len(asked) == 10


def test_false_colours():
    """A bright square in the latents is a bright or dark square in the picture, and it moves as it does there."""
    latents = torch.randn(16, 4, 12, 12, generator=torch.Generator().manual_seed(0)) * 0.05
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for frame in range(4):
        latents[:, frame, 2:6, 2 * frame : 2 * frame + 4] += direction[:, None, None]
    frames = false_colours(latents).astype(float)
    assert frames.shape == (4, 12, 12, 3)
    for frame in range(4):
        grey = frames[frame].mean(-1)
        inside = np.zeros((12, 12), bool)
        inside[2:6, 2 * frame : 2 * frame + 4] = True
        assert abs(grey[inside].mean() - grey[~inside].mean()) > 60
    assert false_colours(torch.zeros(2, 1, 3, 3)).shape == (1, 3, 3, 3)
    assert view_of(latents, "c", "13x96x96").strip.startswith(b"\xff\xd8")
