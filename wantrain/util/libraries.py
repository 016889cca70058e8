"""Imports of large libraries without irrelevant log messages of torchao and bitsandbytes.

transformers imports torchao wherever it is installed, and peft imports transformers; in wantrain only
optimizer=adamw_8bit uses torchao. When imported, torchao 0.18 logs on every machine

  that its compiled kernels cannot be loaded: its wheel holds one built for another Python, and one that needs a certain
  GPU. wantrain does not call them: torchao's AdamW is written in torch operations;
  that it registers two of its own enums with torch in a way that torch 2.13 deprecates, which is for its authors to
  change.

peft imports bitsandbytes wherever it is installed; in wantrain only base.dtype=nf4 uses it. bitsandbytes 0.50 logs on
CPUs with AVX-512 in bf16 that a kernel for products in 4 bits, which wantrain does not call, could not be downloaded.

Only these are suppressed, and only during such an import. All other messages of libraries are shown.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Judge = Callable[[logging.LogRecord], bool]


def _is_about_kernels(record: logging.LogRecord) -> bool:
    return re.match(r"Failed to load .*torchao/_C[^/]*\.so: ", record.getMessage()) is not None


def _is_about_enums(record: logging.LogRecord) -> bool:
    about = record.args[0] if isinstance(record.args, tuple) and record.args else None
    theirs = getattr(about, "__module__", "").startswith("torchao.")
    return theirs and "is an Enum subclass and is now natively supported" in str(record.msg)


def _is_about_products(record: logging.LogRecord) -> bool:
    return str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


#: Suppressed messages, by the name of their logger.
SUPPRESSED: dict[str, Judge] = {
    "torchao": _is_about_kernels,
    "torch.utils._pytree": _is_about_enums,
    "bitsandbytes.backends.cpu.ops": _is_about_products,
}


@contextmanager
def importing() -> Iterator[None]:
    """Around an import that may import torchao or bitsandbytes: the messages in SUPPRESSED are not logged. The garbage
    collector rests meanwhile, which takes a third off such an import, and passes over what it made later. Errors that a
    library caught hold the frames of the import, and by them all that their callers have: they are collected first.
    """
    collects, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    filters = {name: lambda record, judge=judge: not judge(record) for name, judge in SUPPRESSED.items()}
    for name, keeps in filters.items():
        logging.getLogger(name).addFilter(keeps)
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.collect()
            gc.freeze()
        if collects:
            gc.enable()
        for name, keeps in filters.items():
            logging.getLogger(name).removeFilter(keeps)


@contextmanager
def optional(choice: str, package: str, extra: str) -> Iterator[None]:
    """Around the import of a package that only `choice`, an optimizer, needs: ValueError if it is not there."""
    try:
        with importing():
            yield
    except ImportError as error:
        raise ValueError(
            f"optimizer={choice} needs {package} ({error}); pip install 'wantrain[{extra}]', or use optimizer=adamw"
        ) from error


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """True for a tensor that is sharded over processes.

    Does not import torch.distributed.tensor, which takes a second: without that import there are no such tensors.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
