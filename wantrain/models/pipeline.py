"""A whole pipeline on disk, in the diffusers layout: which experts a folder holds, and how one is written.

The layout calls the high-noise expert (or the only one) `transformer` and the low-noise one `transformer_2`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from wantrain.models.transformer import WanTransformer, load_transformer
from wantrain.models.weights import renamed_to_diffusers, write_part

PARTS = {"high_noise": "transformer", "low_noise": "transformer_2", "dense": "transformer"}

_CLASSES = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def held_experts(folder: Path, names: Iterable[str]) -> list[str]:
    """Which of the experts `names` a pipeline folder holds."""
    return [name for name in names if (folder / PARTS[name] / "config.json").is_file()]


def check_boundary(folder: Path, boundary: float | None) -> None:
    """Raise ValueError if the folder's model_index.json says another boundary than the model's config does."""
    index = folder / "model_index.json"
    if not index.is_file():
        return
    stored = read_json(index).get("boundary_ratio")
    if stored != boundary:
        raise ValueError(
            f"{index} has boundary_ratio={stored}, the chosen model has boundary={boundary}; choose model= to match"
        )


def load_experts(
    folder: Path,
    names: Iterable[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, WanTransformer]:
    """The experts `names` of a pipeline folder; ValueError if one is not there."""
    return {name: load_transformer(folder, device=device, dtype=dtype, part=PARTS[name]) for name in names}


def write_pipeline(
    out: Path,
    experts: Mapping[str, WanTransformer],
    *,
    base: Path,
    boundary: float | None,
    shift: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a pipeline that diffusers loads: the experts, and the other parts copied from `base`.

    Parameters that Wan keeps in float32 stay so whatever `dtype` says, as diffusers keeps them too.
    """
    for name, model in experts.items():
        tensors = {
            key: tensor if any(part in key for part in model.fp32_parts) else tensor.to(dtype)
            for key, tensor in model.state_dict().items()
        }
        write_part(out / PARTS[name], model.config(), renamed_to_diffusers(tensors))
    for part in ("vae", "text_encoder", "tokenizer"):
        if not (base / part).is_dir():
            raise ValueError(f"{base} has no {part}/; weights= must name a folder in the diffusers layout")
        shutil.copytree(base / part, out / part, dirs_exist_ok=True)
    _write_json(out / "scheduler" / "scheduler_config.json", _scheduler(shift))
    classes: dict[str, Any] = dict(_CLASSES)
    stated = read_json(out / "tokenizer" / "tokenizer_config.json").get("tokenizer_class")
    classes["tokenizer"] = ["transformers", stated or "T5TokenizerFast"]
    if "low_noise" in experts:
        classes["transformer_2"] = classes["transformer"]
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.36.0",
        "boundary_ratio": boundary,
        "expand_timesteps": False,
        **classes,
    }
    _write_json(out / "model_index.json", index)


def _scheduler(shift: float) -> dict[str, Any]:
    """The published scheduler settings, with the shift that this model was trained for."""
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names a file that is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    assert isinstance(value, dict)
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
