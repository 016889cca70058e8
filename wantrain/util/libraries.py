"""Importing large libraries: when they are asked for, and without two messages of torchao's.

transformers imports torchao wherever it is installed, and peft imports transformers; of wantrain only
optimizer=adamw_8bit asks for torchao. While it is imported, torchao 0.18 logs on every machine

  that its compiled kernels cannot be loaded: its wheel holds one built for another Python, and one that needs a GPU of
  a certain kind. Nothing here calls them: its AdamW is written in torch operations;
  that it registers two of its own enums with torch in a way that torch 2.13 deprecates: for its authors to change.

Exactly these are dropped, and only while an import that was asked for goes on. All else that libraries log is shown.
"""

from __future__ import annotations

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


#: What is dropped, by the name of the logger that says it.
DROPPED: dict[str, Judge] = {"torchao": _is_about_kernels, "torch.utils._pytree": _is_about_enums}


@contextmanager
def importing() -> Iterator[None]:
    """Around an import that may bring torchao with it: what stands in DROPPED is not logged."""
    filters = {name: lambda record, known=known: not known(record) for name, known in DROPPED.items()}
    for name, keeps in filters.items():
        logging.getLogger(name).addFilter(keeps)
    try:
        yield
    finally:
        for name, keeps in filters.items():
            logging.getLogger(name).removeFilter(keeps)


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """True for a tensor that is laid out over processes.

    Asking imports nothing: torch.distributed.tensor takes a second, and where nobody has imported it there is none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
