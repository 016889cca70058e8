"""Which expert a LoRA file is for: what its metadata, its file name and its folder say.

Nothing in a LoRA's tensors tells the experts apart, so what people and tools write beside them is all there is. It is
read here, compared, and never guessed: a file that says nothing is for whichever expert it is given.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

#: Words that make "high" or "low" before them a property of the pictures or of the training: low poly, high rank.
_QUALITY = re.compile(
    "angle|cfg|contrast|cost|cut|def|definition|density|details?|detailed|effort|end|energy|exposure|fantasy|fashion|"
    "fat|fi|fidelity|fps|freq|frequency|grade|guidance|heels?|intensity|jump|key|kick|levels?|light|lighting|lr|mem|"
    "memory|motion|poly|polygon|quality|ram|rank|rate|res|resolution|rise|saturation|school|sigma|speed|strength|tech|"
    "temperature|texture|tide|top|vram|waist"
)
#: Folders of a training run that are numbered, so that the folder above them has the name.
_NUMBERED = re.compile(r"(checkpoint|ckpt|epoch)[-_ ]?\d+")
#: Metadata of a kohya-like trainer: the file of the model that was trained, and (musubi-tuner) that of a second one.
_TRAINED_MODEL, _SECOND_MODEL = "ss_sd_model_name", "ss_dit_high_noise_name"


def noise_named(name: str, *, words: bool = True) -> str | None:
    """The expert that a file or folder name states, "high_noise" or "low_noise"; None if it states neither, or both.

    "high" or "low" beside "noise" decides (`HighNoise`, `wan22-low-noise-fp16`). Only where a name has neither of
    these, and `words` is true, either counts as a word of its own (`_HIGH_`, `-LOW_bf16`, `CatHigh`), unless the next
    word makes it a quality (`low_poly`, `HighRes`).
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Za-z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    parts = [part for part in re.split(r"[\W_]+", spaced.lower()) if part]
    found = set(re.findall(r"(high|(?<![a-z])low)_?noise", "_".join(parts)))
    if not found and words:
        for part, after in itertools.zip_longest(parts, parts[1:], fillvalue=""):
            if (word := part.rstrip("0123456789")) in {"high", "low"} and not _QUALITY.fullmatch(after):
                found.add(word)
    return f"{found.pop()}_noise" if len(found) == 1 else None


def stated_lora_expert(path: str | Path, metadata: Mapping[str, str]) -> str | None:
    """The expert that a LoRA file is for by its metadata, file name or folder; None if none of them says.

    path      the file, or the folder that peft wrote
    metadata  the file's own

    ValueError if they contradict each other.
    """
    says = _statements(Path(path), metadata)
    if len(set(says.values())) > 1:
        raise ValueError(
            f"{path}: {_in_words(says, ', but ')}; rename what is wrong (or, where it is the metadata, export the file "
            "again)"
        )
    return next(iter(says.values()), None)


def check_lora_expert(
    path: str | Path, metadata: Mapping[str, str], expert: str | None, *, key: str | None = None
) -> None:
    """Raise ValueError if a LoRA file says that it is for another expert than `expert`, or contradicts itself.

    expert  high_noise, low_noise, or dense for a single model (for which a name with "high" or "low" as a bare word
            says nothing); None checks only that the file does not contradict itself
    key     the setting that named the file; None: `lora.EXPERT`
    """
    stated = stated_lora_expert(path, metadata)
    if expert is None or stated in {None, expert}:
        return
    if expert == "dense" and stated not in _statements(Path(path), metadata, words=False).values():
        return
    key = key or f"lora.{expert}"
    raise ValueError(
        f"{key}={path} was trained for {stated}, not for {expert}; {_fix(key, stated, expert)} "
        f"({_in_words(_statements(Path(path), metadata), ' and ')}; if that is wrong, rename or export it again)"
    )


def _fix(key: str, stated: str, expert: str) -> str:
    """What to do about a file for `stated` that the setting `key` gives to `expert`."""
    if "dense" in {stated, expert}:
        return "give it to a model of " + ("one transformer" if stated == "dense" else "two experts") + " (model=)"
    if key.startswith("lora."):
        return f"swap the two files, or give it as lora.{stated}="
    return f"give expert={stated}, or with expert=both experts.{stated}.init="


def _statements(path: Path, metadata: Mapping[str, str], *, words: bool = True) -> dict[str, str]:
    """Expert by what states it. A folder's bare "high" or "low" counts only where nothing else says."""
    says: dict[str, str] = {}
    if metadata.get("expert"):
        says["its metadata"] = metadata["expert"]
    model = metadata.get(_TRAINED_MODEL, "") if not metadata.get(_SECOND_MODEL) else ""
    if trained := noise_named(Path(model).name, words=False):
        says[f"its metadata ({_TRAINED_MODEL}={Path(model).name})"] = trained
    folder = path.absolute()
    if not path.is_dir():
        if by_name := noise_named(path.stem, words=words):
            says["its file name"] = by_name
        folder = folder.parent
    if _NUMBERED.fullmatch(folder.name.lower()):
        folder = folder.parent
    if by_folder := noise_named(folder.name, words=words and not says):
        says[f"its folder {folder.name}"] = by_folder
    return says


def _in_words(says: Mapping[str, str], between: str) -> str:
    return between.join(f"{source} says {expert}" for source, expert in says.items())
