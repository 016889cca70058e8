"""A finished folder of shards copied to an address, where train.py can read it: shards first, the manifest last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from wantrain.data.remote import reaching
from wantrain.data.shards import MANIFEST, files_of, load_manifest
from wantrain.util.console import say


def check_address(url: str) -> None:
    """ValueError for an address that cannot be written: HTTP, an unknown scheme, or one whose driver is missing."""
    if "://" not in url or url.startswith(("http://", "https://")):
        raise ValueError(f"upload={url} must be an address that can be written, such as s3://bucket/latents")
    with reaching(url):
        fsspec.core.url_to_fs(url)


def upload_folder(folder: Path, url: str) -> None:
    """Copy a finished folder to `url`. What is there in its size is not sent again, since shards are named by what they
    hold; so the same command goes on after a kill. The manifest is written last, and only then may the folder be read.

    ValueError with the address if a file cannot be written.
    """
    manifest = load_manifest(folder)
    with reaching(url):
        fs, place = fsspec.core.url_to_fs(url)
        fs.makedirs(place, exist_ok=True)
    shards = [file["name"] for file in files_of(manifest)]
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix in {".jsonl", ".html"})
    sent = 0
    for name in tqdm([*shards, *others], desc="upload", unit="file"):
        size = (folder / name).stat().st_size
        if name in others or not _is_there(fs, f"{place}/{name}", size):
            _send(fs, folder / name, f"{place}/{name}", f"{url}/{name}")
            sent += size
    _send(fs, folder / MANIFEST, f"{place}/{MANIFEST}", f"{url}/{MANIFEST}")
    say(f"{folder} is at {url}: {sent / 1e9:.3g} GB sent; data.shards={url} reads it")


def _is_there(fs: Any, path: str, size: int) -> bool:
    with reaching(path):
        return bool(fs.exists(path)) and int(fs.info(path)["size"]) == size


def _send(fs: Any, file: Path, path: str, url: str) -> None:
    with reaching(url, what="written"):
        fs.put_file(str(file), path)
