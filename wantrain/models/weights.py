"""Weights on disk: folders in the diffusers layout, read strictly and written as safetensors; fingerprints.

Only safetensors and json are read here, never a pickle. The transformer wears Wan's official parameter names in
memory and the diffusers names on disk (models/names.py); the VAE and the text encoder have the same in both places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wantrain.models.names import to_diffusers


def renamed_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under their diffusers names."""
    return {to_diffusers(key): tensor for key, tensor in tensors.items()}


def part_folder(path: str | Path, name: str) -> Path:
    """The folder of one part: `path` itself if it is that part, else `path/name` of a pipeline folder."""
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        return path
    if (path / name / "config.json").is_file():
        return path / name
    what = "does not exist" if not path.exists() else f"has neither config.json nor {name}/config.json"
    raise ValueError(f"{path} {what}: give a folder in the diffusers layout, or its {name}/ sub-folder")


def read_config(folder: Path) -> dict[str, Any]:
    """The part's config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    assert isinstance(config, dict)
    return config


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: those its index names, or the single file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder}: its index names {', '.join(absent)}, not there; finish the download")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        what = "holds no .safetensors file" if not files else f"holds {len(files)} .safetensors files and no index"
        raise ValueError(f"{folder} {what}; expected one file, or shards with an index")
    return files


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file, and its metadata. ValueError names a damaged file."""
    path = Path(path).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a part, from one or several safetensors files."""
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(folder):
        tensors.update(read_file(file)[0])
    return tensors


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    fp32: tuple[str, ...] = (),
) -> None:
    """Give `tensors` to a module that may live on the meta device; every parameter once, none left over.

    `dtype` is what floating tensors become (None keeps them); parameters whose name contains one of `fp32` are
    float32 whatever `dtype` says. All missing, unexpected and mis-shaped keys are one ValueError.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshaped = [
        f"{key}: file {tuple(tensors[key].shape)}, model {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    problems = []
    for title, rows in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
        if rows:
            more = f", and {len(rows) - 5} more" if len(rows) > 5 else ""
            problems.append(f"{len(rows)} {title} ({', '.join(rows[:5])}{more})")
    if problems:
        raise ValueError(f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}")
    placed = {}
    for key, tensor in tensors.items():
        wanted = torch.float32 if any(part in key for part in fp32) else dtype
        # A copy, not a view of the mapped file: its odd alignment would change the last digits of every product.
        placed[key] = tensor.to(device, wanted if tensor.is_floating_point() else tensor.dtype, copy=True)
    module.load_state_dict(placed, assign=True)


def write_part(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    file: str = "diffusion_pytorch_model.safetensors",
) -> None:
    """Write one part (config.json and one safetensors file) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / file, metadata={"format": "pt"})
    (folder / file).chmod(0o644)  # safetensors makes files that nobody else on a shared disk can read
    text = json.dumps(dict(config), indent=2, ensure_ascii=False, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits that change when any parameter's name, shape or value does (values as float32).

    Of a module that says what its encodings depend on (`encoding_state`), only that counts.
    """
    state: dict[str, Tensor] = getattr(module, "encoding_state", module.state_dict)()
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
