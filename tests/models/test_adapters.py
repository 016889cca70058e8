"""LoRA: it starts as nothing, is all that trains, keeps float32, comes back from its file, and merges into the same."""

import pytest
import torch

from wantrain.models import WanTransformer, adapters
from wantrain.models.lora import merge_lora
from wantrain.models.weights import read_file
from wantrain.training.parallel import autocast

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 48, "num_layers": 2}
ABOUT = {"expert": "low_noise", "model": "tiny", "boundary": 0.875}


def plain():
    """A transformer whose head answers something."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE)
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    return model


def adapted(*, rank=3, alpha=6, targets="attention+ffn", trained=True):
    """The same with a LoRA; `trained` gives it a change as training would."""
    model = plain()
    adapters.inject(model, rank=rank, alpha=alpha, targets=targets, seed=1)
    if trained:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 3, 4, 6, generator=generator)
    return latents, torch.tensor([900.0, 30.0]), torch.randn(2, 5, 8, generator=generator)


def test_it_starts_as_the_model_it_was_put_into(inputs):
    assert torch.equal(adapted(trained=False)(*inputs), plain()(*inputs))
    assert (adapted()(*inputs) - plain()(*inputs)).abs().max() > 0.01


@pytest.mark.parametrize(("targets", "layers"), [("attention", 16), ("attention+ffn", 20)])
def test_only_the_adapter_trains_on_the_layers_that_were_named(targets, layers, inputs):
    model = adapted(targets=targets)
    model(*inputs).square().sum().backward()
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(graded) == 2 * layers and all("lora_" in name for name in graded)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    assert {name.split(".lora_")[0].split(".", 2)[2] for name in graded if "ffn" in name} == (
        {"ffn.0", "ffn.2"} if "ffn" in targets else set()
    )


def test_the_start_depends_on_its_seed_alone():
    torch.manual_seed(123)
    one = adapters.adapter_layers(adapted(trained=False))
    torch.manual_seed(456)
    two = adapters.adapter_layers(adapted(trained=False))
    assert all(torch.equal(one[name].down, two[name].down) for name in one)
    with pytest.raises(ValueError, match=r"adapter\.targets='all' is unknown; choose one of attention, attention\+ffn"):
        adapted(targets="all")


def test_under_bf16_its_weights_and_gradients_are_float32_and_its_activations_bf16(inputs):
    model = adapted().to(torch.float32)
    seen = {}
    layer = model.blocks[0].self_attn.q

    def note(name):
        return lambda module, given, answer: seen.update({f"{name} in": given[0].dtype, f"{name} out": answer.dtype})

    layer.lora_A["default"].register_forward_hook(note("down"))
    layer.lora_B["default"].register_forward_hook(note("up"))
    with autocast("bf16", torch.device("cpu")), adapters.keep_activation_dtype(model):
        answer = model(*inputs)
    answer.square().sum().backward()
    assert seen == dict.fromkeys(("down in", "down out", "up in", "up out"), torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert (
        {parameter.dtype for parameter in trained} == {parameter.grad.dtype for parameter in trained} == {torch.float32}
    )
    assert answer.dtype == torch.float32


def test_a_frozen_bf16_base_keeps_a_float32_adapter():
    model = plain().to(torch.bfloat16)
    adapters.inject(model, rank=2, alpha=2, targets="attention", seed=0)
    dtypes = {("lora" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_it_comes_back_from_its_file_bit_for_bit(inputs, tmp_path):
    model, fresh = adapted(), adapted(trained=False)
    adapters.save_adapter(tmp_path / "lora.safetensors", model, ABOUT)
    adapters.restore_adapter(tmp_path / "lora.safetensors", fresh)
    assert torch.equal(fresh(*inputs), model(*inputs))
    tensors, about = read_file(tmp_path / "lora.safetensors")
    assert about == {"format": "pt", **{key: str(value) for key, value in ABOUT.items()}}
    ends = {".".join(key.split(".")[-2:]) for key in tensors if not key.endswith("alpha")}
    assert ends == {"lora_A.weight", "lora_B.weight"} and len(tensors) == 3 * 20
    assert tensors["diffusion_model.blocks.1.cross_attn.k.alpha"].item() == 6


@pytest.mark.parametrize("other", [{"rank": 4}, {"targets": "attention"}])
def test_a_file_of_another_shape_is_not_restored(other, tmp_path):
    adapters.save_adapter(tmp_path / "lora.safetensors", adapted(**other), ABOUT)
    with pytest.raises(ValueError, match=r"belongs to another run|in this run it has"):
        adapters.restore_adapter(tmp_path / "lora.safetensors", adapted())


def test_an_adapter_of_another_width_is_not_restored(tmp_path):
    wider = WanTransformer(**{**SIZE, "num_attention_heads": 3})
    adapters.inject(wider, rank=3, alpha=6, targets="attention+ffn", seed=1)
    adapters.save_adapter(tmp_path / "lora.safetensors", wider, ABOUT)
    with pytest.raises(ValueError, match="is 48 x 48, in this run it is 32 x 32; the adapter belongs to another run"):
        adapters.restore_adapter(tmp_path / "lora.safetensors", adapted())


def test_merged_equals_unmerged_and_scale_is_linear(inputs, tmp_path):
    file, base, merged, half_twice = tmp_path / "lora.safetensors", plain(), plain(), plain()
    adapters.save_adapter(file, adapted(), ABOUT)
    assert merge_lora(file, merged, expert="low_noise") == 20
    wanted = adapted()(*inputs)
    assert (merged(*inputs) - wanted).abs().max() < 1e-5
    for _ in range(2):
        merge_lora(file, half_twice, scale=0.5)
    assert (half_twice(*inputs) - wanted).abs().max() < 1e-5
    merge_lora(file, base, scale=0.0)
    assert torch.equal(base(*inputs), plain()(*inputs))
