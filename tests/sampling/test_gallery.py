"""A list of prompts resumes, is shared by processes, never writes over a video, and is shown on a page."""

import json
import os
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

from wantrain.models.formats.lora import write_lora
from wantrain.models.formats.lora_layers import Layer
from wantrain.sampling import gallery as room
from wantrain.sampling.generate import Sampler

PROMPTS = ["a red ring", "一只猫 <b>&</b>", "חתול 🐈 drei", "a red ring"]
#: A small video of the micro model.
SMALL = (
    *("height=32", "width=32", "num_frames=5", "steps=2"),
    *("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32"),
)


@pytest.fixture
def listed(pair, call, tmp_path):
    """listed(...): samples the file of prompts; says which videos there are with their times."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    def run(*more, check=True):
        ended = call("sample.py", f"weights={pair}", "prompts=prompts.txt", *SMALL, *more, check=check)
        return ended, {path.name: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("*.mp4")}

    return run


@pytest.fixture
def micro_lora(tmp_path):
    """A LoRA file for the micro model that says nothing about its expert."""
    layer = Layer(torch.ones(1, 128), torch.ones(64, 1), 1.0)
    write_lora(tmp_path / "style.safetensors", {"blocks.0.ffn.0": layer})
    return tmp_path / "style.safetensors"


def test_finished_list_kept(listed, monkeypatch, tmp_path):
    """A finished list of prompts is not sampled again, and no model is loaded."""
    _, first = listed("count=2")
    assert [name[:11] for name in sorted(first)] == [f"{i:03d}_seed_{i % 2}_" for i in range(6)]
    monkeypatch.setattr(Sampler, "batch", lambda *_, **__: pytest.fail("it was made again"))
    monkeypatch.setattr("wantrain.runs.experts.load_transformer", lambda *_, **__: pytest.fail("it was loaded"))
    ended, again = listed("count=2")
    assert again == first and "samples: 6 of 6 videos are there already and are kept" in ended.stdout


def test_stopped_list_resumes(listed, monkeypatch, tmp_path):
    """A stopped list of prompts continues with its first incomplete video."""
    made, batch = [], Sampler.batch

    def dies(self, prompts, **how):
        if len(made) == 2:
            raise ValueError("the lights went out")
        made.extend(prompts)
        return batch(self, prompts, **how)

    monkeypatch.setattr(Sampler, "batch", dies)
    ended, before = listed(check=False)
    assert "the lights went out" in ended.error and len(before) == 2
    half = tmp_path / "samples" / (sorted(before)[1])
    half.with_suffix(".json").unlink()  # as if it had died between the two
    made.clear()
    _, after = listed()
    assert made == PROMPTS[1:3] and len(after) == 3
    assert after[sorted(before)[0]] == before[sorted(before)[0]]


def test_videos_never_overwritten(listed, call, pair, tmp_path):
    """Other settings, prompts or weights never overwrite a video."""
    _, first = listed()
    contents = {name: (tmp_path / "samples" / name).read_bytes() for name in first}
    listed("guidance.low_noise=5")
    call("sample.py", f"weights={pair}", "prompt=something else", *SMALL)
    config = pair / "transformer" / "config.json"
    before = config.stat()
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # other weights, for all that anybody can see
    _, last = listed()
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(last) == 3 + 3 + 1 + 3
    assert all((tmp_path / "samples" / name).read_bytes() == content for name, content in contents.items())


def test_added_prompt(listed, tmp_path, monkeypatch):
    """After a prompt is added to the list only its video is made."""
    _, before = listed()
    made, batch = [], Sampler.batch
    monkeypatch.setattr(
        Sampler, "batch", lambda self, prompts, **how: made.extend(prompts) or batch(self, prompts, **how)
    )
    (tmp_path / "prompts.txt").write_text("\n".join(["new", *PROMPTS]), encoding="utf-8")
    _, after = listed()
    assert made == ["new"] and before.items() <= after.items() and len(after) == 4


def test_two_processes_share_list(listed, monkeypatch, tmp_path):
    """Two processes share the list and make each video once."""
    made, batch = {}, Sampler.batch
    for rank in ("0", "1"):

        def note(self, prompts, *, rank=rank, **how):
            made.setdefault(rank, []).extend(prompts)
            return batch(self, prompts, **how)

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "batch", note)
            # As a launcher sets them, inside the command's own environment.
            patch.setattr("wantrain.util.distributed.rank", lambda rank=rank: int(rank))
            patch.setattr("wantrain.util.distributed.world_size", lambda: 2)
            listed()
    assert made == {"0": [PROMPTS[0], PROMPTS[2]], "1": [PROMPTS[1]]}
    page = (tmp_path / "samples" / "index.html").read_text(encoding="utf-8")
    assert page.count("<video") == 3
    monkeypatch.setattr(Sampler, "batch", lambda *_, **__: pytest.fail("it was made again"))
    _, files = listed()
    assert len(files) == 3


def test_page_of_prompts(listed, tmp_path):
    """The page shows every prompt, in any script, with its settings and scores."""
    _, files = listed("count=2")
    page = (tmp_path / "samples" / "index.html").read_text(encoding="utf-8")
    assert sorted(re.findall(r'<video src="([^"]+)"', page)) == sorted(files)
    assert "一只猫 &lt;b&gt;&amp;&lt;/b&gt;" in page and "חתול 🐈 drei" in page and "<b>" not in page
    assert "5x32x32, 2 steps of unipc, shift 3, guidance 2, 2; fp32<" in page
    about = json.loads(next((tmp_path / "samples").glob("000_*.json")).read_text(encoding="utf-8"))
    assert f"motion {about['motion']:.2f}, flicker {about['flicker']:.2f}; pipeline" in page
    assert (about["prompt"], about["seed"], about["size"]) == (PROMPTS[0], 0, "5x32x32")


#: The JSON of a sample as an earlier version wrote it.
OLD = {
    "number": 0,
    "prompt": "a ring",
    "seed": 0,
    "identity": "0" * 12,
    "size": "5x32x32",
    "weights": "tiny",
    "settings": {
        "guidance": {"dense": 2.0},
        "shift": 3.0,
        "steps": 4,
        "solver": "euler",
        "negative_prompt": "",
        "precision": "bf16",
        "tile": None,
        "lora": [0.5, None],
    },
    "motion": 1.0,
    "flicker": 0.5,
}


def test_words_under_a_video():
    """Precision, tile and LoRAs are named; a sample of before is shown with what it has."""
    line = "motion 1.00, flicker 0.50; tiny; 5x32x32, 4 steps of euler, shift 3, guidance 2"
    assert room.in_words(OLD) == f"{line}; bf16"
    loras = {
        "high_noise": [{"run": "r", "file": "adapter.safetensors", "strength": 0.5}],
        "low_noise": [{"file": "a.safetensors", "strength": 1.0}, {"file": "b.safetensors", "strength": -2.0}],
    }
    new = {**OLD, "settings": {**OLD["settings"], "tile": 32, "loras": loras}}
    assert room.in_words(new) == (
        f"{line}; bf16; tile 32; LoRA of high_noise: run r x 0.5; "
        "LoRA of low_noise: a.safetensors x 1, b.safetensors x -2"
    )
    bare = {**OLD, "settings": {key: value for key, value in OLD["settings"].items() if key != "precision"}}
    assert room.in_words(bare) == line


def test_lora_of_either_expert(pair, call, tmp_path, micro_lora):
    """The same file in the other expert, or at another strength, is another sample; its JSON and the page name all."""
    low = f"lora.low_noise={micro_lora}"
    ways = (
        ([f"lora.high_noise={micro_lora}"], 1),
        ([low], 2),
        ([f"lora.low_noise=[{micro_lora}]", "lora.scale=0.5"], 3),
        (["solver=euler", "precision=bf16"], 4),
        ([low, "lora.scale={low_noise: 1}"], 4),  # the second again
    )
    for more, videos in ways:
        call("sample.py", f"weights={pair}", "prompt=a ring", *SMALL, *more)
        assert len(list((tmp_path / "samples").glob("*.mp4"))) == videos
    settings = [json.loads(path.read_text())["settings"] for path in (tmp_path / "samples").glob("000_*.json")]
    seen = {json.dumps([each["loras"], each["solver"], each["precision"]]) for each in settings}
    named = [{"file": micro_lora.name, "strength": strength} for strength in (1.0, 0.5)]
    assert {json.dumps([{"low_noise": [each]}, "unipc", "fp32"]) for each in named} <= seen and len(seen) == 4
    page = (tmp_path / "samples" / "index.html").read_text(encoding="utf-8")
    assert f"LoRA of low_noise: {micro_lora.name} x 0.5" in page and "steps of euler" in page and "bf16" in page


def test_folder_that_cannot_be_written(listed, tmp_path, monkeypatch):
    """A folder that cannot be written is refused before a model is loaded."""
    monkeypatch.setattr("wantrain.models.formats.base.load_transformer", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("wantrain.models.formats.base.load_text_encoder", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "file").touch()
    for out in ("file/samples", "/proc/samples"):
        ended, _ = listed(f"out={out}", check=False)
        assert f"out={out} cannot be written" in ended.error


def test_full_disk_keeps_finished_videos(listed, monkeypatch, tmp_path):
    """A disk that fills up is one line; finished videos stay, and nothing half-written does."""
    written, imwrite = [], iio.imwrite

    def cut(path, *args, **how):
        imwrite(path, *args, **how)
        written.append(path)
        if len(written) == 2:  # as ffmpeg does: it ends without a word, and the index was never written
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)

    with monkeypatch.context() as patch:
        patch.setattr(iio, "imwrite", cut)
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        ended, files = listed(check=False)
    assert "No space left on device" in ended.error and len(files) == 1
    assert not [path for path in (tmp_path / "samples").iterdir() if path.name.startswith(".")]
    _, after = listed()
    assert files.items() <= after.items() and len(after) == 3


def test_interrupt_between_frames_and_file(listed, monkeypatch, tmp_path):
    """Ctrl-C while a video is written is one line and leaves no temporary file."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
        ended, files = listed(check=False)
    lines = [line for line in ended.stderr.replace("\r", "\n").splitlines() if "Ctrl-C" in line]
    assert ended.returncode == 130 and len(lines) == 1 and "Traceback" not in ended.stderr
    assert files == {} and list((tmp_path / "samples").iterdir()) == []


@pytest.mark.slow
def test_compare_runs(tiny, pair, call, tmp_path):
    """compare= shows the videos of several runs side by side on one page."""
    train = (*tiny.train, f"weights={pair}", "batch_size=2", "steps=1", "optimizer.lr=1e-2")
    call("train.py", *train, "expert=low_noise", "run=low")
    call("train.py", *train, "expert=high_noise", "run=high")
    (tmp_path / "p.txt").write_text("a red ring\na cat\n")
    said = call("sample.py", "compare=[low,high+low,base]", "prompts=p.txt", *SMALL).stdout
    out = tmp_path / "compare"
    page = (out / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<video src="([^"]+)"', page)
    assert [Path(file).parent.name for file in shown] == ["low", "high%2Blow", "base"] * 2
    assert all((out / file.replace("%2B", "+")).is_file() for file in shown)
    assert "low step 1" in page and "high step 1 + low step 1" in page and "compare/index.html shows low beside" in said
    videos = [(out / file.replace("%2B", "+")).read_bytes() for file in shown]
    assert len(set(videos)) == 6, "a run, a pair and the base give different videos"
    call("sample.py", f"weights={pair}", "prompts=p.txt", "out=alone", *SMALL)
    assert videos[2] == next((tmp_path / "alone").glob("000_*.mp4")).read_bytes()
    error = call("sample.py", "compare=[low,nothing]", "prompts=p.txt", "out=none", *SMALL, check=False).error
    assert "there is no run nothing in runs" in error and not (tmp_path / "none").exists()


def test_contact_sheet_limit(listed, monkeypatch, tmp_path):
    """The contact sheet shows a limited number of videos."""
    seen = []
    monkeypatch.setattr(room, "SHOWN", 2)
    monkeypatch.setattr(room, "contact_sheet", lambda path, clips: seen.append(list(clips)))
    listed()
    assert len(seen[0]) == 2 and seen[0][0].endswith(": a red ring")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("height=40", "width=32"), "height, width: height x width 40x32 must be multiples of 16"),
        (("num_frames=6",), "num_frames=6 is not 4k+1"),
        (
            ("tile=100",),
            "tile=100: height x width 100x100 must be multiples of 8 (VAE stride times patch); the nearest",
        ),
        (("tile=-8",), "tile=-8 must be above 0"),
        (("offload.experts=ram",), "offload.experts=ram is unknown; choose one of none, cpu, disk"),
        (("offload.blocks=all",), "offload.blocks=all must be true or false"),
        (("lora.dense=x",), "lora.dense=x: this model has high_noise, low_noise, no dense"),
    ],
)
def test_bad_settings(more, said, listed, tmp_path):
    """Settings that cannot be sampled are one clear error, before any file is written."""
    ended, files = listed(*more, check=False)
    assert said in ended.error and files == {} and not (tmp_path / "samples").exists()


@pytest.mark.slow
def test_offload_and_tile_same_video(listed, tmp_path):
    """Every offload policy and a single tile give the same video."""
    contents = set()
    for way in (
        ("offload.experts=none",),
        ("offload.experts=cpu", "offload.blocks=true"),
        ("offload.experts=disk",),
        ("tile=32",),
    ):
        listed(*way, f"out={'_'.join(way)}")
        contents.add(b"".join(path.read_bytes() for path in sorted((tmp_path / "_".join(way)).glob("*.mp4"))))
    assert len(contents) == 1
