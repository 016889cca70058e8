"""Texts are encoded once, where there is room for it, and before the experts come."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from wantrain.models import Base
from wantrain.models.formats.weights import read_tensors
from wantrain.models.text import TextEncoder
from wantrain.sampling import build as sampling
from wantrain.training.engine.placement import Placement
from wantrain.training.validation import build

TEXTS = ["a red ring moving left", "", "一只猫 🐈", "a red ring moving left"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
SMALL = (
    *("height=32", "width=32", "num_frames=5", "steps=1"),
    *("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32"),
)


@pytest.fixture
def events(monkeypatch):
    """What is loaded and encoded, in order: names of experts, and texts."""
    found, transformer, encode = [], Base.transformer, TextEncoder.encode_unpadded

    def load(self, name, **how):
        found.append(f"expert {name}")
        return transformer(self, name, **how)

    def note(self, prompts):
        found.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(Base, "transformer", load)
    monkeypatch.setattr(TextEncoder, "encode_unpadded", note)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoder_released(dtype, tiny, monkeypatch):
    """Each text is encoded alone and once, and nothing of the encoder stays in memory."""
    base, loaded, load = Base(tiny.base), [], Base.text_encoder
    encoder = base.text_encoder(dtype=dtype)
    wanted = {text: encoder.encode_unpadded([text])[0] for text in TEXTS}

    def note(self, **how):
        made = load(self, **how)
        loaded.append((how["device"], weakref.ref(made), weakref.ref(made.model.shared.weight)))
        return made

    monkeypatch.setattr(Base, "text_encoder", note)
    gc.disable()  # what is let go is let go at once
    try:
        found = sampling.encode_texts(base, TEXTS, device="cpu", dtype=dtype)
        ((device, module, weight),) = loaded
        assert device == CPU and module() is None and weight() is None
    finally:
        gc.enable()
    assert list(found) == ["a red ring moving left", "", "一只猫 🐈"]
    assert all(torch.equal(found[text], wanted[text]) for text in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_device(dtype, tiny, monkeypatch, capsys):
    """The encoder runs on the GPU if its weights and working memory fit there, else on the CPU with a message."""
    base = Base(tiny.base)
    weights = sum(tensor.numel() for tensor in read_tensors(tiny.base / "text_encoder").values()) * dtype.itemsize
    needed, asked = weights + sampling.ENCODING, []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("emptied"))
    for free, place in ((needed, CUDA), (needed - 1, CPU)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: asked.append(device) or (free, 0))
        assert sampling._encoder_device(base, CUDA, dtype) == place
        assert ("texts are encoded on the CPU: it takes 1.1 GB, cuda:1 has" in capsys.readouterr().out) == (
            place == CPU
        )
    assert asked == ["emptied", CUDA] * 2
    other = torch.device("meta")
    assert sampling._encoder_device(base, other, dtype) == other and len(asked) == 4, "no other device is asked"


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_sampling_encodes_first(offload, pair, call, tmp_path, events):
    """Sampling encodes every text once, before it loads an expert."""
    (tmp_path / "p.txt").write_text("a red ring\na cat\n")
    call(
        "sample.py",
        f"weights={pair}",
        "prompts=p.txt",
        "count=2",
        "negative_prompt=blurred",
        f"offload.experts={offload}",
        *SMALL,
    )
    assert events[:4] == ["a red ring", "a cat", "blurred", "expert high_noise"]
    assert all(event.startswith("expert") for event in events[3:]), "no text is encoded again"


@pytest.mark.parametrize("expert", [pytest.param("low_noise", marks=pytest.mark.slow), "both"])
def test_training_encodes_first(expert, tiny, pair, call, tmp_path, events):
    """A run encodes the texts of its previews before it loads an expert."""
    (tmp_path / "p.txt").write_text("a red ring\na cat\n")
    seen = ("sample.every=1", "sample.steps=1", "sample.prompts=p.txt", "sample.count=1", "model.num_frames=5")
    seen = (*seen, "model.negative_prompt=blurred")
    command = (*tiny.train, f"weights={pair}", "batch_size=2", f"expert={expert}")
    call("train.py", *command, *seen, "steps=2", "run=r")
    assert events[:2] == ["a red ring", "blurred"] and set(events[2:]) == {"expert high_noise", "expert low_noise"}
    assert len(list((tmp_path / "runs" / "r" / "samples").glob("*.mp4"))) == 3
    events.clear()
    call("train.py", *command, "steps=1", "run=without")
    call("train.py", *command, *seen, "steps=1", "run=dry", "dry_run=true")
    assert all(event.startswith("expert") for event in events), "without previews, or dry, no text is encoded"


@pytest.mark.parametrize(("engine", "others"), [("ddp", {}), ("fsdp2", {"told": "by the main process"})])
def test_texts_across_ranks(engine, others, tiny, monkeypatch):
    """Only the main process encodes, and sends the embeddings to the ranks that sample too.

    Ranks that sample nothing load and keep nothing.
    """
    placement = Placement(None, engine, CPU, CPU, None)
    model = {"conditioning": "none", "area": 1024, "multiple": 16, "num_frames": 5, "negative_prompt": "blurred"}
    settings = {"sample": {"every": 2, "prompts": None, "count": 2}, "expert": {"name": "low_noise"}, "model": model}
    data = SimpleNamespace(captions=lambda: ["a red ring", "a cat", "a dog"])
    made = build.texts_needed(data, settings, {}, placement, Base(tiny.base), torch.float32)
    assert list(made) == ["a red ring", "a cat", "blurred"]

    monkeypatch.setattr(build, "on_main", lambda work, doing: {"told": "by the main process"})
    monkeypatch.setattr(build.distributed, "is_main", lambda: False)
    monkeypatch.setattr(Base, "text_encoder", lambda *_, **__: pytest.fail("it was loaded"))
    assert build.texts_needed(data, settings, {}, placement, Base(tiny.base), torch.float32) == others
