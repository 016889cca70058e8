"""Other projects' networks with the same weights as ours: the other side of benchmarks. Only benchmarks and tests need
it. diffusers' are the usual ones; DiffSynth-Studio's transformer is there where `pip install diffsynth` was done.

A frozen weight is one tensor for both sides, so that two networks of 14B fit on one card. What diffusers keeps in
another dtype, as its from_pretrained does, is a copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models import WanTransformer, WanVAE
from wantrain.models.formats.names import to_diffusers
from wantrain.util import libraries

#: diffusers' name of an attention kernel of ours, where it has the same.
KERNELS = {"cudnn": "_native_cudnn", "flash2": "_native_flash"}


def missing() -> str | None:
    """Why diffusers cannot be used here; None if it can."""
    try:
        with libraries.importing():
            from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
    except Exception as error:  # whatever an import of another version of its needs may raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def transformer(ours: WanTransformer, *, share: bool = True) -> nn.Module:
    """WanTransformer3DModel with the weights of ours, frozen and trained alike, and peft's LoRA with the same values.

    share  frozen weights are the same tensors; False: every weight is a copy
    """
    with libraries.importing():
        from diffusers import WanTransformer3DModel
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    config = {name: value for name, value in ours.config().items() if not name.startswith("_")}
    with torch.device("meta"):
        theirs: Any = WanTransformer3DModel(**config)
    plain = {name.replace(".base_layer", ""): own for name, own in ours.named_parameters() if "lora_" not in name}
    dtype = plain["blocks.0.ffn.0.weight"].dtype
    for name, own in plain.items():
        twin = to_diffusers(name)
        kept = any(part in twin.split(".") for part in theirs._keep_in_fp32_modules)
        value = own.detach().to(torch.float32 if kept else dtype, copy=not share)
        owner, _, leaf = twin.rpartition(".")
        parameter = nn.Parameter(value, requires_grad=own.requires_grad)
        setattr(theirs.get_submodule(owner), leaf, parameter)
    device = plain["blocks.0.ffn.0.weight"].device
    theirs.rope = WanRotaryPosEmbed(ours.attention_head_dim, config["patch_size"], config["rope_max_seq_len"])
    theirs.rope.to(device)
    _add_lora(theirs, ours)
    assert not any(tensor.is_meta for tensor in (*theirs.parameters(), *theirs.buffers()))
    module: nn.Module = theirs
    return module


class DiffSynth(nn.Module):
    """DiffSynth-Studio's WanModel as its trainer calls it.

    recompute  computes every block again in the backward
    """

    def __init__(self, dit: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.dit, self.call, self.recompute = dit, call, False

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Velocity (B, C, T, H, W)."""
        what = {"latents": latents, "timestep": timestep, "context": text}
        return self.call(self.dit, **what, use_gradient_checkpointing=self.recompute)


def diffsynth_transformer(ours: WanTransformer) -> DiffSynth:
    """DiffSynth-Studio's WanModel with the weights of ours, which has the same names, and peft's LoRA as its trainer
    adds it, with the same values. ImportError where the package `diffsynth` is absent.
    """
    with libraries.importing():
        from diffsynth.models.wan_video_dit import WanModel
        from diffsynth.pipelines.wan_video import model_fn_wan_video

    plain = {name.replace(".base_layer", ""): own for name, own in ours.named_parameters() if "lora_" not in name}
    theirs: Any = WanModel(
        dim=ours.num_attention_heads * ours.attention_head_dim,
        in_dim=ours.in_channels,
        ffn_dim=plain["blocks.0.ffn.0.weight"].shape[0],
        out_dim=ours.out_channels,
        text_dim=ours.text_dim,
        freq_dim=plain["time_embedding.0.weight"].shape[1],
        eps=ours.eps,
        patch_size=tuple(ours.config()["patch_size"]),
        num_heads=ours.num_attention_heads,
        num_layers=len(ours.blocks),
        has_image_input=False,
    )
    theirs.load_state_dict({name: own.detach() for name, own in plain.items()})
    if values := {name: own for name, own in ours.named_parameters() if "lora_" in name}:
        from peft import LoraConfig, inject_adapter_in_model

        layers = sorted({name.partition(".lora_")[0] for name in values})
        theirs.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(**_like_ours(ours), target_modules=layers), theirs)
        _take(theirs, values)
    return DiffSynth(theirs, model_fn_wan_video)


def vae(ours: WanVAE) -> nn.Module:
    """AutoencoderKLWan with the same weights."""
    with libraries.importing():
        from diffusers import AutoencoderKLWan

    names = ("base_dim", "decoder_base_dim", "z_dim", "is_residual", "patch_size")
    config: dict[str, Any] = {name: getattr(ours, name) for name in names}
    config |= {"latents_mean": ours.latents_mean, "latents_std": ours.latents_std}
    if ours.patch_size:
        channels = 3 * ours.patch_size**2
        config |= {"in_channels": channels, "out_channels": channels, "scale_factor_spatial": ours.spatial_stride}
    with torch.device("meta"):
        theirs: Any = AutoencoderKLWan(**config)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    module: nn.Module = theirs.eval().requires_grad_(False)
    return module


def encoded(theirs: Any, pixels: Tensor) -> Tensor:
    """Normalised latents (B, C, T, H, W) of pixels, as ours are."""
    mean, std = _statistics(theirs, pixels)
    latents: Tensor = (theirs.encode(pixels).latent_dist.mode() - mean) / std
    return latents


def decoded(theirs: Any, latents: Tensor) -> Tensor:
    """Pixels of normalised latents."""
    mean, std = _statistics(theirs, latents)
    pixels: Tensor = theirs.decode(latents * std + mean).sample
    return pixels


def _statistics(theirs: Any, like: Tensor) -> list[Tensor]:
    values = (theirs.config.latents_mean, theirs.config.latents_std)
    return [torch.tensor(each, device=like.device).view(1, -1, 1, 1, 1) for each in values]


def _add_lora(theirs: Any, ours: WanTransformer) -> None:
    """peft's LoRA beside the same layers as in ours, with the values that ours has."""
    values = {twin_of(name): own for name, own in ours.named_parameters() if "lora_" in name}
    if not values:
        return
    from peft import LoraConfig

    layers = sorted({name.partition(".lora_")[0] for name in values})
    theirs.add_adapter(LoraConfig(**_like_ours(ours), target_modules=layers))
    _take(theirs, values)


def _like_ours(ours: nn.Module) -> dict[str, Any]:
    """peft's settings of the LoRA that ours has."""
    first: Any = next(module for module in ours.modules() if hasattr(module, "lora_A"))
    rank = first.r["default"]
    return {"r": rank, "lora_alpha": first.scaling["default"] * rank, "lora_dropout": 0.0}


def _take(theirs: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters copies of these values."""
    own = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].data = value.detach().clone()


def twin_of(name: str) -> str:
    """diffusers' name of a parameter of ours, of a LoRA too."""
    layer, dot, rest = name.partition(".lora_")
    if dot:
        return to_diffusers(f"{layer}.weight").removesuffix("weight") + f"lora_{rest}"
    return to_diffusers(re.sub(r"\.base_layer\b", "", name))


def gradients(ours: nn.Module, theirs: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every gradient of both sides, under the other one's names."""

    def found(module: nn.Module) -> dict[str, Tensor]:
        parameters = module.named_parameters()
        return {name.replace(".base_layer", ""): p.grad for name, p in parameters if p.grad is not None}

    if isinstance(theirs, DiffSynth):
        return found(ours), {name.removeprefix("dit."): grad for name, grad in found(theirs).items()}
    return {twin_of(name): grad for name, grad in found(ours).items()}, found(theirs)


def apart(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two sets of tensors, as a share of the tensor's largest value, and whose it is.

    A tensor whose largest value is below a thousandth of the others' (their root mean square) counts as that large:
    such a gradient is rounding alone. NaN if one is NaN.
    """
    assert mine.keys() == theirs.keys(), f"tensors of one side only: {sorted(mine.keys() ^ theirs.keys())[:4]}"
    names = list(theirs)
    largest = torch.stack([theirs[name].detach().abs().max().double() for name in names])
    least = 1e-3 * largest.square().mean().sqrt()
    between = torch.stack([(mine[name].double() - theirs[name].double()).abs().max() for name in names])
    errors = (between / torch.maximum(largest, least).clamp(min=1e-30)).tolist()
    worst = max(range(len(names)), key=lambda place: math.inf if math.isnan(errors[place]) else errors[place])
    return errors[worst], names[worst]
