"""Operations as counted from the layers are those that torch's counter sees: full, LoRA, partial, computed again."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wantrain import config
from wantrain.models import WanTransformer, adapters, partial
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.flops import training_flops

SIZE = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "text_dim": 64, "ffn_dim": 256}
FRAMES, HEIGHT, WIDTH, TEXT = 3, 12, 16, 40
TOKENS = FRAMES * (HEIGHT // 2) * (WIDTH // 2)


def seen(module, timesteps):
    """What torch counts in one forward and backward of one sample."""
    latents = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH)
    timestep = torch.full((1,) if timesteps == 1 else (1, timesteps), 500.0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused kernels are not all counted
        module(latents, timestep, torch.randn(1, TEXT, 64)).square().mean().backward()
    return counter.get_total_flops()


def lora(module, targets):
    adapters.inject(module, adapters.AdapterSettings(rank=4, alpha=4.0, targets=targets), seed=0)


def lokr(module, rank):
    shape = adapters.KroneckerSettings(factor=4, decompose_both=False)
    adapters.inject(module, adapters.AdapterSettings(rank=rank, alpha=rank, targets="all", lokr=shape), seed=0)


HOW = {
    "full": lambda module: None,
    "lora": lambda module: lora(module, "attention"),
    "lora of all": lambda module: lora(module, "all"),
    "lokr": lambda module: lokr(module, 4),
    "lokr, whole": lambda module: lokr(module, 400),
    "upper blocks": lambda module: partial.train_only(module, layers="2-3", tags=None),
    "head": lambda module: partial.train_only(module, layers=None, tags=["head"]),
}


@pytest.mark.parametrize("timesteps", [1, FRAMES])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("how", HOW)
def test_flops_match_torch_counter(how, again, timesteps):
    """The counted operations agree with torch's counter within one per cent."""
    torch.manual_seed(0)
    module = WanTransformer(**SIZE, num_layers=4)
    HOW[how](module)
    module.run_block = ActivationPolicy("block" if again else "none", blocks=4)
    found = training_flops(module, tokens=TOKENS, text_rows=TEXT + 1, timesteps=timesteps)
    assert found.executed == pytest.approx(seen(module, timesteps), rel=0.01)
    assert (found.recompute > 0) == (again and how != "head")


@pytest.mark.parametrize(
    ("model", "tokens", "forward", "full", "with_lora"),
    [  # TFLOP of the published sizes at 512 rows of text: the Wan authors' shapes, by the formulas
        ("t2v_a14b", 32_760, 1678.4, 5035, 4250),
        ("t2v_a14b", 75_600, 6523.4, 19_570, 17_761),
        ("t2v_1_3b", 32_760, 283.0, 849, 767),
        ("ti2v_5b", 27_280, 517.0, 1551, 1314),
    ],
)
def test_flops_of_published_models(model, tokens, forward, full, with_lora):
    """The counts of the published sizes equal the formulas' values, in full and with fewer trained layers."""
    cfg = config.compose("train", [f"model={model}"])
    with torch.device("meta"):
        module = config.build(cfg.model.transformer)
    timesteps = tokens if model == "ti2v_5b" else 1  # the published 5B embeds a time per token; we one per frame
    whole = training_flops(module, tokens=tokens, text_rows=512, timesteps=timesteps)
    if model != "ti2v_5b":
        assert whole.forward / 1e12 == pytest.approx(forward, rel=1e-3)
        assert whole.model / 1e12 == pytest.approx(full, rel=1e-3)
    module.requires_grad_(False)
    for block in module.blocks:
        for layer in (block.self_attn, block.cross_attn):
            layer.q.weight.requires_grad_(True)
    part = training_flops(module, tokens=tokens, text_rows=512)
    assert part.model < whole.model
    if model != "ti2v_5b":
        queries = sum(4 * tokens * module.dim**2 for _ in module.blocks)
        assert (part.model - queries) / 1e12 == pytest.approx(with_lora, rel=5e-3)
