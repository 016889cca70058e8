"""Captioning with tiny random models in the published layouts; a model that takes videos needs torchvision."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_vlm import CHAT, has_torchvision, write_llava, write_qwen2, write_qwen3, write_tokenizer

from wantrain.models.captioner import Captioner, load_captioner

CPU = torch.device("cpu")


def load(folder, **more):
    return load_captioner(
        str(folder), **{"revision": None, "device": CPU, "dtype": torch.float32, "max_tokens": 16, **more}
    )


def clips(*shapes, rate):
    generator = np.random.default_rng(0)
    return [(generator.integers(0, 255, (*shape, 3), dtype=np.uint8), rate) for shape in shapes]


VIDEOS = clips((5, 56, 84), (4, 60, 60), (8, 112, 56), rate=2.0)
PICTURES = clips((1, 56, 84), (1, 60, 60), rate=0.0)


@pytest.fixture(scope="module", params=[write_llava, write_qwen2, write_qwen3])
def captioner(request, tmp_path_factory):
    if request.param != write_llava and not has_torchvision():
        pytest.skip("torchvision is not installed")
    return load(request.param(tmp_path_factory.mktemp(request.param.__name__)))


@pytest.mark.parametrize("batch", [VIDEOS, PICTURES], ids=["videos", "pictures"])
def test_batches(batch, captioner):
    """A clip's answer does not depend on what it is batched with, and depends on what is seen and asked."""
    prompts = ["say what is there", "and a longer question about this one", "what"][: len(batch)]
    together = captioner.describe(batch, prompts)
    assert together == [captioner.describe([clip], [prompt])[0] for clip, prompt in zip(batch, prompts, strict=True)]
    assert together == captioner.describe(batch, prompts), "greedy"
    assert len({answer.text for answer in together}) == len(batch)
    darker = [(frames // 4, rate) for frames, rate in batch]
    for other in (captioner.describe(darker, prompts), captioner.describe(batch, ["else"] * len(batch))):
        assert all(one.text != another.text for one, another in zip(together, other, strict=True))


def test_order_of_frames(captioner):
    """A video is more than its frames: played backwards it gets another answer."""
    (frames, rate), *_ = VIDEOS
    one, other = captioner.describe([(frames, rate), (frames[::-1].copy(), rate)], ["say"] * 2)
    assert one.text != other.text


def test_times_of_frames(captioner):
    """A model that takes videos is given their times."""
    if not captioner.takes_videos:
        pytest.skip("it takes pictures only")
    for rate in (1.0, 8.0):
        inputs = captioner._inputs([(VIDEOS[0][0], rate)], ["say"])
        assert inputs["video_grid_thw"][0, 0] == 3, "five frames, two to a step"
        if "second_per_grid_ts" in inputs:
            assert list(inputs["second_per_grid_ts"]) == [2 / rate]
        else:
            seconds = re.findall(r"<([\d.]+) seconds>", captioner.tokenizer.decode(inputs["input_ids"][0]))
            assert [float(each) for each in seconds] == pytest.approx([0.5 / rate, 2.5 / rate, 4 / rate], abs=0.06)


def test_memory_too_small(captioner, monkeypatch):
    """What is too large for the device's memory is one line with the keys that help."""

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captioner.model, "generate", full)
    with pytest.raises(
        ValueError, match=r"memory of cpu is too small for 3 clips of up to 8x112x56 .*; give batch_size=1"
    ):
        captioner.describe(VIDEOS, ["say"] * 3)


def test_answer():
    """What a thinking model writes before its answer is dropped; without an end of text the answer was cut."""

    class Model:
        class generation_config:
            eos_token_id = (7, 8)

        def eval(self):
            return self

        def requires_grad_(self, _):
            return self

    class Processor:
        class tokenizer:
            pass

    Model.generation_config.eos_token_id = [7, 8]
    captioner = Captioner(Model(), Processor(), max_tokens=4)
    assert captioner._answer("hm\n</think>\n\nA cat.", [1, 2, 8]) == ("\n\nA cat.", False)
    assert captioner._answer("A ca", [1, 2, 3]) == ("A ca", True)
    assert captioner.tokenizer.padding_side == "left"


def test_no_such_captioner(tmp_path, monkeypatch):
    """What is neither a folder nor to be fetched is one line with the fix."""
    with pytest.raises(ValueError, match=r"captioner=.*nowhere is not there; give a model's folder, or a repository"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"captioner=.*file is a file"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"captioner_revision=main is of a repository of the hub"):
        load(tmp_path, revision="main")

    def offline(name, **how):
        assert how["revision"] == "main" and not any(
            "bin" in pattern or "py" in pattern for pattern in how["allow_patterns"]
        )
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ValueError, match=r"captioner=a/b is neither a folder here .* at captioner_revision=main: no conn"
    ):
        load("a/b", revision="main")


def test_no_vision_language_model(tmp_path):
    """A folder without a model, and one with another kind of model, are refused."""
    with pytest.raises(ValueError, match=r"captioner=\S+ cannot be loaded: "):
        load(tmp_path)
    write_tokenizer(tmp_path, CHAT)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"captioner=\S+ cannot be loaded: "):
        load(tmp_path)


@pytest.mark.skipif(has_torchvision(), reason="torchvision is installed")
def test_without_torchvision(tmp_path):
    """A model whose processor takes videos names what to install."""
    write_tokenizer(tmp_path, CHAT)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    parts = {"image_processor": "Qwen2VLImageProcessor", "video_processor": "Qwen2VLVideoProcessor"}
    content = {key: {f"{key}_type": name} for key, name in parts.items()}
    content["processor_class"] = "Qwen2_5_VLProcessor"
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"needs torchvision, which is not installed .* pip install 'wantrain\[captions\]'"
    ):
        load(tmp_path)
