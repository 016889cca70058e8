"""Weights on disk: tensors read from every kind of file, given strictly to a module, and written as safetensors.

Reading maps files into memory and copies each tensor once, straight to its device and dtype; a tensor that needs no
copy stays in the map. So loading takes the module's own bytes and little more. Files are safetensors, or pickles (.pth,
.pt, .bin) read through torch's weights-only loader, which runs no code.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wantrain.models.facts import is_fp32
from wantrain.models.formats.file_kind import why_unreadable
from wantrain.models.formats.names import to_diffusers
from wantrain.models.formats.tensor_file import ALIGNMENT, PADDING, write_tensors
from wantrain.util import distributed
from wantrain.util.files import write_json
from wantrain.util.progress import report_progress

#: Name of the file with a part's tensors, or of its files: diffusers' name.
PART = "diffusion_pytorch_model"
PICKLES = frozenset((".pth", ".pt", ".bin"))
#: End of the name of the file that says which tensor is in which of several files.
INDEX = ".safetensors.index.json"
#: Writes tensors with metadata into one file, and gives its sha256.
WriteFile = Callable[[Path, Mapping[str, Any], Mapping[str, object] | None], str]
#: Largest file of a part: diffusers' default, which hubs and file systems take.
SHARD_BYTES = 5 << 30
#: Tensors of at least so many bytes are filled in threads.
LARGE = 1 << 20
#: Tensors that are read at once on a CPU, at most: more threads gain nothing.
MOST_THREADS = 8
#: Linux's MADV_POPULATE_WRITE (5.14 or newer), which makes the pages of a range; Python 3.11 has no name for it.
POPULATE_WRITE = 23


def renamed_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors under their diffusers names."""
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names a file that is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The part's config.json."""
    return read_json(folder / "config.json")


def tensor_files(path: str | Path) -> list[Path]:
    """The files that hold a part's tensors: `path` itself, those that a folder's index names, or its single file."""
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    indexes = sorted(path.glob(f"*{INDEX}"))
    if indexes:
        return _indexed(indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        what = "holds no .safetensors file" if not files else f"holds {len(files)} .safetensors files and no index"
        raise ValueError(f"{path} {what}; expected one file, or shards with an index")
    return files


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index.parent}: its index names {', '.join(absent)}, not there; finish the download")
    return [index.parent / name for name in names]


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one file, mapped rather than copied, and its metadata. ValueError names a damaged file."""
    path = Path(path).expanduser()
    if path.suffix in PICKLES:
        return _read_pickle(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, _said(file)  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise ValueError(_unreadable(path, "safetensors", error)) from error


def _unreadable(path: Path, form: str, error: Exception) -> str:
    """What is said of a file that a reader refused: what it is instead, or the reader's own words."""
    return f"{path} cannot be read as {form}: {why_unreadable(path) or error}"


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A state dict from torch's own format, without running code from the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a truncated zip, a missing file, a foreign class: torch has no classes of its own
        if "weights only" not in str(error).lower():
            raise ValueError(_unreadable(path, "torch weights", error)) from error
        raise ValueError(
            f"{path} holds more than tensors, and loading it would run code from the file; refused. "
            "Give a safetensors file, or save its state dict alone"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict: a mapping from names to tensors is expected")
    return state


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a part's first safetensors file; empty for a pickle, or where there is none."""
    first = tensor_files(path)[0]
    if first.suffix in PICKLES:
        return {}
    try:
        with safe_open(first, framework="pt") as file:
            return _said(file)
    except Exception as error:  # as in read_file
        raise ValueError(_unreadable(first, "safetensors", error)) from error


def _said(file: Any) -> dict[str, str]:
    return {key: value for key, value in (file.metadata() or {}).items() if key != PADDING}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a part, from one file or the several files of a folder."""
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(path):
        tensors.update(read_file(file)[0])
    return tensors


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    fp32: Iterable[str] = (),
    mapped: bool = False,
) -> None:
    """Give `tensors` to a module that may be on the meta device: every parameter once, none left over.

    `dtype` is what floating tensors become (None keeps them); parameters named in `fp32`, and those that the module
    declares as float32, are float32 whatever `dtype` says. With `mapped` nothing is copied: the module gets the tensors
    themselves, in mapped files and in their own dtypes. All missing, unexpected and mis-shaped keys are one
    ValueError; another names tensors that hold NaN or infinity, or only zeros where a trained model has none (the
    module's `zero_at_start` lists the ends of names that may be zero).
    """
    check_keys(module, tensors, where)
    report_progress(f"loading {where}")
    names_fp32 = set(fp32)
    wanted = {key: torch.float32 if key in names_fp32 or is_fp32(module, key) else dtype for key in tensors}
    # All are allocated before any is filled: an allocation waits while another thread has the kernel make pages.
    places = dict(tensors) if mapped else {key: _place_for(each, device, wanted[key]) for key, each in tensors.items()}

    def fill(key: str) -> Tensor:
        report_progress(f"loading {where}: {key}")
        tensor, place = tensors[key], places[key]
        if place is not tensor:
            make_pages(place)
            place.copy_(tensor)
        return place.sum()

    # Large tensors in several threads, since memory is the limit; for a small one the hand-over would take longer.
    workers = min(distributed.cores(), MOST_THREADS) if torch.device(device).type == "cpu" else 1
    large = [key for key, tensor in tensors.items() if tensor.nbytes >= LARGE]
    with ThreadPoolExecutor(workers) as pool:
        filled = pool.map(fill, large)
        sums = {key: fill(key) for key in tensors.keys() - set(large)} | dict(zip(large, filled, strict=True))
    sick, may_be_zero = [], getattr(module, "zero_at_start", ("bias",))
    # All sums in one read: reading each would make the host wait for the GPU a thousand times.
    totals = dict(zip(sums, torch.stack([each.float() for each in sums.values()]).tolist(), strict=True))
    for key, place in places.items():
        total = totals[key]
        if math.isfinite(total) and total != 0:
            continue  # a NaN or an infinity would show in the sum: only tensors with another sum are examined
        low, high = _range(place)
        if not (low > -math.inf and high < math.inf):
            sick.append(f"{key} is NaN or infinite")
        elif low == high == 0 and not key.endswith(may_be_zero):
            sick.append(f"{key} is all zeros")
    if sick:
        raise ValueError(
            f"{where} holds {_some('tensor', sick)} that no trained model has; the file is damaged or was never written"
            " in full: download or export it again"
        )
    module.load_state_dict(places, assign=True)


def check_keys(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise ValueError unless `tensors` are a module's parameters, by name and shape."""
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshaped = [
        f"{key}: file {tuple(tensors[key].shape)}, model {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    problems = [
        _some(title, rows)
        for title, rows in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if rows
    ]
    if problems:
        raise ValueError(f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}")


def _some(title: str, rows: list[str]) -> str:
    more = f", and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{len(rows)} {title} ({', '.join(rows[:5])}{more})"


def _place_for(tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """Memory for a tensor's values on `device`, in `dtype` (None: its own) if they are floating.

    A tensor that needs neither another device nor another dtype stays what it is, or in the mapped file (a write to it
    is private), unless it is not aligned as torch aligns tensors: that would change the last digits of every product,
    so that the same weights from another file would give other results.
    """
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    there = torch.device(device).type == tensor.device.type
    stays = there and dtype == tensor.dtype and tensor.data_ptr() % ALIGNMENT == 0
    return tensor if stays else torch.empty_like(tensor, device=device, dtype=dtype)


def make_pages(tensor: Tensor) -> None:
    """Have the kernel make a tensor's pages in one call: a page fault for each costs more than filling them."""
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    # An older kernel refuses, and makes them one by one. Not by the mmap module, which would hold Python's lock.
    if begin < end:
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), POPULATE_WRITE)


_libc = ctypes.CDLL(None)


def _range(tensor: Tensor) -> tuple[float, float]:
    """Least and greatest value, NaN if it has one; (0, 1) where it is empty."""
    if tensor.numel() == 0:
        return 0.0, 1.0
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    return low, high


def write_part(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    name: str = PART,
    metadata: Mapping[str, object] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[Path, str]:
    """Write one part into `folder`: config.json, and its tensors as `write_files` does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hashes = write_files(folder, name, tensors, metadata, shard_bytes=shard_bytes)
    write_json(folder / "config.json", dict(sorted(config.items())))
    return hashes


def write_files(
    folder: Path,
    name: str,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, object] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    write: WriteFile = lambda path, tensors, metadata: write_file(path, tensors, metadata, aligned=True),
) -> dict[Path, str]:
    """Write tensors into `folder` as one safetensors file called `name` or, beyond `shard_bytes`, several with an
    index, each with `metadata`. Returns what `write` gives for each file: its sha256.
    """
    shards = _shards(tensors, shard_bytes)
    where, hashes = dict[str, str](), dict[Path, str]()
    for number, keys in enumerate(shards, 1):
        file = f"{name}.safetensors" if len(shards) == 1 else f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        hashes[folder / file] = write(folder / file, {key: tensors[key] for key in keys}, metadata)
        where.update(dict.fromkeys(keys, file))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / f"{name}{INDEX}", {"metadata": {"total_size": total}, "weight_map": where})
    return hashes


def read_files(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors that `write_files` wrote into `folder` under `name`. ValueError names what is absent or damaged."""
    index = folder / f"{name}{INDEX}"
    files = _indexed(index) if index.is_file() else [folder / f"{name}.safetensors"]
    return {key: tensor for file in files for key, tensor in read_file(file)[0].items()}


def write_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None, *, aligned: bool = False
) -> str:
    """Write one safetensors file and return its sha256; tensors of an `aligned` file can be used as they are mapped."""
    about = {"format": "pt", **{key: str(value) for key, value in (metadata or {}).items() if value is not None}}
    return write_tensors(path, tensors, about, aligned=aligned)


def _shards(tensors: Mapping[str, Any], limit: int) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds `limit` bytes (unless one tensor does by itself)."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def dtypes(tensors: Iterable[Tensor]) -> str:
    """The dtypes among tensors in words: "bfloat16", or "bfloat16 and float32"."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits that change when any parameter's name, shape or value does (values as float32).

    Of a module with an `encoding_state` (what its encodings depend on) only that counts.
    """
    state: dict[str, Tensor] = getattr(module, "encoding_state", module.state_dict)()
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        report_progress(f"making a fingerprint: {key}")
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
