"""A LoRA file that training starts from: which expert it is for, and which kinds can be trained on."""

import pytest
import torch

from wantrain.models import Base, adapters
from wantrain.models.formats.lora import write_lora
from wantrain.models.formats.lora_layers import Difference, Layer
from wantrain.training.initialize import Initializer

Q = {"blocks.0.self_attn.q": Layer(torch.randn(4, 128), torch.randn(128, 4), 2.0)}


def start(pair, expert, file):
    """A start of the tiny model's `expert` from a LoRA file."""
    adapter = {"name": "lora", "init": file, "rank": 16, "alpha": 16, "targets": "attention"}
    facts = {"model": {"name": "tiny", "boundary": 0.875}, "expert": {"name": expert, "part": "transformer"}}
    where = {"base": Base(pair), "init": "base", "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    return Initializer(make=None, **facts, adapter=adapter, **where)


@pytest.mark.parametrize("name", ["cat-LOW_bf16.safetensors", "low_noise/cat.safetensors", "cat.safetensors"])
def test_init_of_expert(name, pair, tmp_path):
    """A LoRA whose name, folder or metadata says low noise starts the low-noise expert, and no other."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    write_lora(file, Q, metadata={"expert": "low_noise"} if name == "cat.safetensors" else {})
    module = Base(pair).transformer("low_noise")
    assert start(pair, "low_noise", file).adapt(module) == {"rank": 4, "alpha": 2.0, "targets": "as in the file"}
    assert torch.equal(adapters.adapter_layers(module)["blocks.0.self_attn.q"].up, Q["blocks.0.self_attn.q"].up)
    module = Base(pair).transformer("high_noise")
    words = r"^adapter\.init=.* was trained for low_noise, not for high_noise; give expert=low_noise, or .*\(its "
    with pytest.raises(ValueError, match=words):
        start(pair, "high_noise", file).adapt(module)
    assert not adapters.has_adapter(module)


def test_init_of_whole_differences(pair, tmp_path):
    """A file with whole differences beside its LoRA is not trained on from."""
    file = tmp_path / "lightning.safetensors"
    write_lora(file, {**Q, "blocks.0.norm3": Difference(torch.randn(128))})
    module = Base(pair).transformer("low_noise")
    with pytest.raises(ValueError, match=r"changes blocks\.0\.norm3 by a whole difference, which is merged but not tr"):
        start(pair, "low_noise", file).adapt(module)
    assert not adapters.has_adapter(module)
