"""Checks of what is installed: Python, packages and their versions, extras, compilers, locks of builds."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from wantrain.doctor.finding import Finding, Options
from wantrain.util import libraries
from wantrain.util.build_locks import stale_locks

#: Packages whose versions are shown; the others are counted.
SHOWN = ("torch", "accelerate", "deepspeed", "transformers", "peft")
#: What each extra of pyproject.toml is for; `dev` is for work on this project.
EXTRAS = {
    "scenes": "shard.py scenes=split",
    "remote": "footage and shards at s3:// and gs://",
    "captions": "caption.py with a captioner that takes videos, as the default one does",
    "tensorboard": "tracker=tensorboard",
    "trackio": "tracker=trackio",
    "mlflow": "tracker=mlflow",
    "8bit": "optimizer=adamw_8bit",
    "quant": "base.dtype=nf4",
    "adaptive": "optimizer=prodigy and schedule_free",
}


def check_python(options: Options) -> Iterator[Finding]:
    """The version of Python and the system."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    wanted = str(_project(options.root).get("requires-python") or ">=3.11")
    least = tuple(map(int, re.findall(r"\d+", wanted)))
    old = sys.version_info[: len(least)] < least
    yield Finding("python", found, f"install Python {wanted}" if old else "", broken=old)


def check_packages(options: Options) -> Iterator[Finding]:
    """The packages that wantrain needs, in versions that it takes."""
    needed = [Requirement(text) for text in _project(options.root)["dependencies"]]
    wrong = [each for each in needed if (version := _version(each.name)) is None or version not in each.specifier]
    for each in wrong:
        version = _version(each.name)
        found = f"{each.name} {version}" if version else f"{each.name} is not installed"
        yield Finding("packages", found, f"pip install '{each}'", broken=True)
    shown = ", ".join(f"{name} {_version(name)}" for name in SHOWN if _version(name))
    if not wrong:
        yield Finding("packages", f"{shown}; all {len(needed)} are in the versions that wantrain takes")


def check_extras(options: Options) -> Iterator[Finding]:
    """The optional packages: one line for each extra."""
    listed = _project(options.root).get("optional-dependencies", {})
    for extra, purpose in EXTRAS.items():
        needed = [Requirement(text) for text in listed.get(extra, [])]
        fix = f"pip install 'wantrain[{extra}]', for {purpose}"
        missing = [each.name for each in needed if _version(each.name) is None]
        there = [f"{each.name} {_version(each.name)}" for each in needed]
        if missing:
            yield Finding("extras", f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed", fix)
        elif errors := [error for each in needed if (error := _import_error(each.name)) is not None]:
            yield Finding("extras", errors[0], f"install it again: {fix}")
        elif needed:
            yield Finding("extras", f"{', '.join(there)} for {purpose}")


def check_compiler(options: Options) -> Iterator[Finding]:
    """What builds kernels at their first use: for compile=blocks, attention=flex and ZeRO-3 with offload."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    what = "compile=blocks, attention=flex and ZeRO-3 with offload"
    if compiler is None:
        yield Finding("compiler", "no C++ compiler", f"install g++, for {what}")
    elif not headers:
        yield Finding("compiler", f"{compiler}, but no Python.h", f"install Python's headers (python3-dev), for {what}")
    else:
        yield Finding("compiler", f"{compiler}, Python.h")
    if torch.version.cuda is not None:
        triton, nvcc = _version("triton"), shutil.which("nvcc")
        fix = "" if triton else "pip install triton, for compile=blocks and attention=flex on a card"
        yield Finding("compiler", f"triton {triton}" if triton else "no triton", fix)
        fix = "" if nvcc else f"install CUDA {torch.version.cuda}'s compiler, for ZeRO-3 with offload on a card"
        yield Finding("compiler", nvcc or "no nvcc", fix)


def check_build_locks(options: Options) -> Iterator[Finding]:
    """Locks that killed builds of DeepSpeed's kernels left: a start under DeepSpeed refuses them."""
    locks = stale_locks()
    for lock, minutes in locks:
        fix = f"rm {lock}: a killed build left it, and every start under DeepSpeed would wait"
        yield Finding("build locks", f"{lock} is {minutes:.0f} minutes old", fix, broken=True)
    if not locks:
        yield Finding("build locks", "none of a killed build of DeepSpeed's kernels")


def _project(root: Path) -> dict[str, Any]:
    """The table [project] of pyproject.toml, of the checkout or from the installed package."""
    file = root / "pyproject.toml"
    if file.is_file():
        project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project
    about = importlib.metadata.metadata("wantrain")
    needed: dict[str, list[str]] = {}
    for text in about.get_all("Requires-Dist") or []:
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", text)
        needed.setdefault(extra[1] if extra else "", []).append(text.split(";")[0].strip())
    return {
        "requires-python": about["Requires-Python"],
        "dependencies": needed.pop("", []),
        "optional-dependencies": needed,
    }


def _version(name: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(package: str) -> str | None:
    """Why an installed package cannot be imported, in one line; None if it can."""
    try:
        with libraries.importing():
            importlib.import_module(package)
    except Exception as error:  # whatever a broken package raises
        return f"{package} cannot be imported ({' '.join(str(error).split())[:200]})"
    return None
