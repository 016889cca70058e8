"""Kept texts: the same results bit for bit, with the text's own work done once; kept where it is worth the memory."""

import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from wantrain import geometry
from wantrain.models import WanTransformer, adapters
from wantrain.models.flops import text_flops, training_flops
from wantrain.models.kept_text import KeptText
from wantrain.models.offload import OffloadPolicy
from wantrain.models.transformer import Attention
from wantrain.sampling import generate, memory
from wantrain.sampling.generate import Experts, Texts
from wantrain.sampling.offload import ExpertOffloader

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "text_length": 12, "ffn_dim": 32,
        "num_layers": 3}  # fmt: skip


def scrambled(seed):
    model, generator = WanTransformer(**SIZE).eval().requires_grad_(False), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [5, 12])
@pytest.mark.parametrize("how", ["plain", "lora", "bf16", "blocks on the host"])
def test_same_bits(how, rows):
    """Three calls with other latents and timesteps; keys and values are made once in each block, where its weights are
    on the device."""
    model = scrambled(0)
    text, asked = (
        drawn(2, rows, 8),
        [(drawn(2, 16, 2, 4, 4, seed=each), torch.full((2,), 900.0 - each)) for each in range(3)],
    )
    if how == "lora":
        adapters.inject(model, adapters.AdapterSettings(2, 2.0, "all"), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
        wanted = [model(*each, text) for each in asked]
        if how == "blocks on the host":
            load = lambda name, device: model.to(device)  # noqa: E731
            model = ExpertOffloader(["dense"], load, torch.device("cpu"), OffloadPolicy("cpu", True))["dense"]
        kept = KeptText(text)
        with mock.patch.object(Attention, "keys_values", autospec=True, side_effect=Attention.keys_values) as made:
            found = [model(*each, kept) for each in asked]
    assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))
    assert not torch.equal(found[0], found[1]) and made.call_count == SIZE["num_layers"]
    with pytest.raises(AssertionError, match="weights that train"):
        model(*asked[0], KeptText(text))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling(scale, monkeypatch):
    """Sampling with two experts gives the same bits with kept texts and without; those of the first expert are freed
    when the second one is at work."""
    models = {"high_noise": scrambled(1), "low_noise": scrambled(2)}
    seen, init = [], KeptText.__init__

    def noted(self, text_BLD):
        init(self, text_BLD)
        seen.append(weakref.ref(self))

    monkeypatch.setattr(KeptText, "__init__", noted)
    alive = []

    def run(worth):
        monkeypatch.setattr(memory, "WORTH", worth)
        return generate(
            Experts(models, 0.9), latents=drawn(1, 16, 2, 4, 4), texts=Texts(drawn(1, 5, 8), drawn(1, 3, 8, seed=1)),
            sigmas=torch.tensor([1.0, 0.95, 0.6, 0.3, 0.0]), guidance=dict.fromkeys(models, scale), solver="euler",
            on_step=lambda step, name: alive.append(sum(each() is not None for each in seen)),
        )  # fmt: skip

    without = run(2.0)
    assert not seen and torch.equal(run(0.0), without)
    assert len(seen) == 4 and alive[4:] == [0, 2, 2, 2]
    assert all(each() is None for each in seen)


def test_worth():
    """Counted: what depends on the text alone is its share of a forward; it is kept of an image, not of a long clip."""
    with torch.device("meta"):
        model = WanTransformer(num_layers=2)
    whole, fewer = (training_flops(model, tokens=1560, text_rows=rows).forward for rows in (512, 511))
    attention = 2 * 4 * 1560 * model.dim  # of one row, in both blocks
    assert text_flops(model, 512) == 512 * (whole - fewer - attention)

    def is_kept(frames, rows):
        shape = geometry.latent_shape(geometry.Bucket(frames, 480, 832), 4, 8)
        latents, text = (torch.empty(size, device="meta") for size in ((1, 16, *shape), (1, rows, 4096)))
        return isinstance(memory.kept(model, latents, text), KeptText)

    assert [is_kept(1, 512), is_kept(1, 20), is_kept(81, 512)] == [True, False, False]
    assert memory.kept(lambda *inputs: None, torch.empty(1, 16, 1, 4, 4), text := torch.empty(1, 9, 8)) is text
    seen = SimpleNamespace(network=scrambled(0))
    assert isinstance(memory.kept(seen, torch.empty(1, 16, 1, 4, 4), text), KeptText)
    seen.network.blocks[0].forward = seen.network.blocks[0].forward  # as BlockCompiler puts it there
    assert memory.kept(seen, torch.empty(1, 16, 1, 4, 4), text) is text
