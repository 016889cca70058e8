"""Writing a model so that others load it: a diffusers pipeline, Wan's official layout, or ComfyUI's single files.

Each comes with a model card (README.md) with its origin and the values to sample it with: published schedulers have
another shift than Wan's authors sample with, so the card always states it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wantrain.models.facts import is_fp32
from wantrain.models.formats.base import OFFICIAL, PARTS, Base
from wantrain.models.formats.export_folder import staged
from wantrain.models.formats.weights import SHARD_BYTES, read_json, renamed_to_diffusers, write_file, write_part
from wantrain.models.transformer import WanTransformer
from wantrain.util.files import made_by, write_json

CARD = "README.md"

_CLASSES = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


@dataclass(frozen=True)
class About:
    """Facts about a written model, for its files' metadata and its card.

    model     the model's name in conf/model
    boundary  sigma from which the high-noise expert answers; None for a single model
    shift     flow shift to sample with
    guidance  guidance scale to sample with, per expert
    steps     solver steps to sample with
    origin    per expert: run, step, recipe, base, commit, adapter (whatever is known)
    conditioning  its conditioning type (wantrain/conditioning.py)
    """

    model: str
    boundary: float | None
    shift: float
    guidance: Mapping[str, float | None] = field(default_factory=dict)
    steps: int = 30
    origin: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    conditioning: str = "none"

    def metadata(self, expert: str) -> dict[str, object]:
        """The metadata of an expert's files."""
        facts = {"expert": expert, "model": self.model, "boundary": self.boundary, "made_by": made_by()}
        return {**facts, **self.origin.get(expert, {})}


def write_pipeline(
    out: Path,
    experts: Iterable[tuple[str, WanTransformer]],
    *,
    base: Base,
    about: About,
    layout: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    further: Callable[[Path], None] | None = None,
) -> None:
    """Write the experts (name, module), one after the other, into `out` in a layout (diffusers, official,
    comfyui), with a card; in diffusers' a whole pipeline, its VAE, text encoder and tokenizer from `base`.
    `further` writes more files into the folder that it is given.

    Parameters that Wan keeps in float32 stay so whatever `dtype` says, as diffusers keeps them too. What stood in
    `out` before is replaced only when all is written (export_folder.py).
    """
    names: list[str] = []
    with staged(out, layout) as folder:
        for name, model in experts:
            names.append(name)
            tensors = {
                key: tensor if is_fp32(model, key) else tensor.to(dtype) for key, tensor in model.state_dict().items()
            }
            how: dict[str, Any] = {"metadata": about.metadata(name), "shard_bytes": shard_bytes}
            if layout == "diffusers":
                write_part(folder / PARTS[name], model.config(), renamed_to_diffusers(tensors), **how)
            elif layout == "official":
                write_part(folder / OFFICIAL[name], official_config(model, about.conditioning), tensors, **how)
            else:
                (folder / "diffusion_models").mkdir(exist_ok=True)
                file = folder / "diffusion_models" / f"{out.name}_{name}.safetensors"
                write_file(file, tensors, about.metadata(name), aligned=True)
        if layout == "diffusers":
            _write_surroundings(folder, names, base, about)
        (folder / CARD).write_text(card(out.name, names, base, about, layout), encoding="utf-8")
        if further is not None:
            further(folder)


def _write_surroundings(folder: Path, experts: Sequence[str], base: Base, about: About) -> None:
    """Write all parts of a diffusers pipeline except its transformers."""
    copy_parts(folder, base)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(about.shift))
    classes: dict[str, Any] = dict(_CLASSES)
    stated = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class")
    classes["tokenizer"] = ["transformers", stated or "T5TokenizerFast"]
    if "low_noise" in experts:
        classes["transformer_2"] = classes["transformer"]
    index = {
        "_class_name": _pipeline_class(about.conditioning),
        "_diffusers_version": "0.36.0",
        "boundary_ratio": about.boundary,
        "expand_timesteps": about.conditioning == "clean_frames",
        **classes,
    }
    if about.conditioning == "channel_concat":
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    write_json(folder / "model_index.json", index)


def _pipeline_class(conditioning: str) -> str:
    """diffusers' pipeline class: image-to-video has its own if mask and image latents are input channels."""
    return "WanImageToVideoPipeline" if conditioning == "channel_concat" else "WanPipeline"


def copy_parts(folder: Path, base: Base) -> None:
    """VAE, text encoder and tokenizer of `base` as parts of a diffusers pipeline; a single file is rewritten as one."""
    for part in ("vae", "text_encoder", "tokenizer"):
        source = base.need(part)
        if source.is_dir():
            shutil.copytree(source, folder / part)
        elif part == "vae":
            vae = base.vae()
            write_part(folder / part, vae.config(), vae.state_dict())
        else:
            model = base.text_encoder(dtype=torch.bfloat16).model
            tensors = {key: value for key, value in model.state_dict().items() if "embed_tokens" not in key}
            config = {**model.config.to_dict(), "architectures": ["UMT5EncoderModel"]}
            write_part(folder / part, config, tensors, name="model")


def official_config(model: WanTransformer, conditioning: str) -> dict[str, Any]:
    """config.json of the official layout, which holds only what differs between models."""
    return {
        "_class_name": "WanModel",
        "model_type": {"channel_concat": "i2v", "clean_frames": "ti2v"}.get(conditioning, "t2v"),
        "text_len": model.text_length,
        "in_dim": model.in_channels,
        "dim": model.dim,
        "ffn_dim": model.ffn_dim,
        "freq_dim": model.freq_dim,
        "out_dim": model.out_channels,
        "num_heads": model.num_attention_heads,
        "num_layers": model.num_layers,
        "eps": model.eps,
    }


def card(name: str, experts: Sequence[str], base: Base, about: About, layout: str) -> str:
    """The card of a written model, in Markdown."""
    where = {
        "diffusers": PARTS,
        "official": OFFICIAL,
        "comfyui": {expert: f"diffusion_models/{name}_{expert}.safetensors" for expert in experts},
    }[layout]
    rows = [
        f"| {expert} | `{where[expert]}` | {', '.join(f'{k} {v}' for k, v in about.origin.get(expert, {}).items())} |"
        for expert in experts
    ]
    scales = {expert: about.guidance.get(expert) for expert in experts}
    values = [f"| steps | {about.steps} |", f"| flow shift | {about.shift} |"]
    values += [f"| guidance, {expert} | {scale} |" for expert, scale in scales.items() if scale is not None]
    if about.boundary is not None:
        values.append(f"| boundary between the experts | sigma {about.boundary} (ties are high noise) |")
    first, second = (*scales.values(), None)[:2]
    passed = [f"guidance_scale={first}"] + ([f"guidance_scale_2={second}"] if second is not None else [])
    opener = _pipeline_class(about.conditioning)
    with_image = " (from an image: `WanImageToVideoPipeline`)" if about.conditioning == "clean_frames" else ""
    use = {
        "diffusers": f"`{opener}.from_pretrained(FOLDER)`{with_image}; pass {', '.join(passed)} (high noise first) and "
        f"num_inference_steps={about.steps}. The scheduler here carries flow_shift={about.shift}; schedulers of the "
        "published pairs carry 3.0, which is not what their authors sample at.",
        "official": "The transformers alone. VAE and text encoder are those of the base and stay in its folder: "
        "`Wan2.1_VAE.pth` (`Wan2.2_VAE.pth` for the 5B) and `models_t5_umt5-xxl-enc-bf16.pth` with `google/umt5-xxl/`.",
        "comfyui": "Load each file as a diffusion model; VAE and text encoder are those of the base.",
    }[layout]
    lines = [
        f"# {name}",
        "",
        f"A model of the Wan family ({about.model}), {layout} layout, written by {made_by()}.",
    ]
    lines += ["", "| Part | Where | Origin |", "|---|---|---|", *rows, "", f"Base: {base.name}", ""]
    lines += ["## How to sample it", "", "| Setting | Value |", "|---|---|", *values, "", use, ""]
    return "\n".join(lines)


def _scheduler(shift: float) -> dict[str, Any]:
    """The published scheduler's settings, with the model's own shift."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.36.0",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
