"""Repositories of the Hugging Face hub, copied to this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wantrain.util.progress import report_progress
from wantrain.util.restarts import Transient


def is_repository(name: str) -> bool:
    """True if this can be the name of a repository: owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def fetch(repository: str, revision: str | None, patterns: Sequence[str], *, key: str, revision_key: str) -> Path:
    """A snapshot of the files of a hub repository that match `patterns`, on this machine; an interrupted download
    continues.

    key, revision_key  the config keys of repository and revision, for messages

    ValueError if it cannot be fetched; Transient, unless the hub answers that it is not there.
    """
    import huggingface_hub

    report_progress(f"downloading {repository}")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), tqdm_class=_progress_bar(repository)
            )
        )
    except Exception as error:  # offline, no such repository, no permission: many classes, one meaning here
        at = "" if revision is None else f" at {revision_key}={revision}"
        absent = huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.RevisionNotFoundError
        kind = ValueError if isinstance(error, absent) else Transient
        raise kind(
            f"{key}={repository} is neither a folder here nor a repository that could be fetched from the hub{at}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _progress_bar(repository: str) -> type:
    """The hub's progress bar, which also reports progress to the watchdog, even where no bar is shown."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            report_progress(f"downloading {repository}")
            return super().update(n)

    return Bar
