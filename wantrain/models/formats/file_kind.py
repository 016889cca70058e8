"""What a file is that could not be read as weights: a download that went wrong, or another format."""

from __future__ import annotations

import json
from pathlib import Path

#: First bytes of what people give for weights.
_STARTS = (
    (b"GGUF", "it is a GGUF file, a quantised format that is neither trained nor merged; take the bf16 or fp16 file"),
    (b"version https://git-lfs", "it is a pointer of git-lfs, not the weights; run git lfs pull in its repository"),
    (b"\x1f\x8b", "it is a gzip file; unpack it"),
    (b"PK\x03\x04", "it is a zip file, as torch writes (.pth, .pt); give it its own suffix, or unpack it"),
    (b"\x80\x02", "it is a pickle; give it the suffix .pth"),
)
#: Of these the last two are what a file with such a suffix should be.
_PICKLE_STARTS, _PICKLES = (b"PK\x03\x04", b"\x80\x02"), frozenset((".pth", ".pt", ".bin"))
_PAGES = (b"<!doctype", b"<html", b"<?xml")
#: The longest header that the safetensors library takes.
_LONGEST_HEADER = 100_000_000
_AGAIN = "download or export it again"
_NO_HEADER = f"its first bytes are not the header of such a file; it is another format, or damaged: {_AGAIN}"


def why_unreadable(path: Path) -> str | None:
    """What a file is that a reader refused, and what to do; None if nothing is known."""
    if not path.exists():
        return "it does not exist"
    if path.is_dir():
        return "it is a folder; give the file in it"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            if size == 0:
                return f"it is empty; {_AGAIN}"
            if head.lstrip().lower().startswith(_PAGES):
                return "it is a web page, such as a login or an error, saved in place of the weights; download it again"
            for magic, words in _STARTS:
                if head.startswith(magic) and not (magic in _PICKLE_STARTS and path.suffix in _PICKLES):
                    return words
            rest = file.read(max(0, min(int.from_bytes(head[:8], "little"), _LONGEST_HEADER)))
        damage = _damage(size, head, rest)
        return None if damage == _NO_HEADER and path.suffix in _PICKLES else damage
    except PermissionError:
        return "no permission to open it"


def _damage(size: int, head: bytes, rest: bytes) -> str | None:
    """What is missing of a safetensors file, or that it is text; `rest` is what follows `head` of its header."""
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= _LONGEST_HEADER:
        if size < 8 + length:
            return f"it is cut short: its header alone takes {8 + length:,} bytes, and {size:,} are there; {_AGAIN}"
        try:
            entries = json.loads((head + rest)[8 : 8 + length])
            end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError):
            return _NO_HEADER
        whole = 8 + length + end
        return f"it is cut short: {size:,} of {whole:,} bytes are there; {_AGAIN}" if size < whole else None
    try:
        words = " ".join(head.decode().split())
    except UnicodeDecodeError:
        return _NO_HEADER
    return f"it is text ({words[:60]!r}), not weights; {_AGAIN}" if words.isprintable() else _NO_HEADER
