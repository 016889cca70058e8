"""The doctor: checks of what training needs, one line each, which ends in ok or the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from wantrain.doctor.finding import Finding, Options
from wantrain.doctor.hardware import check_attention, check_card, check_disk, check_memory, check_shared_memory
from wantrain.doctor.network import check_hub, check_wandb
from wantrain.doctor.software import (
    check_build_locks,
    check_compiler,
    check_extras,
    check_packages,
    check_python,
)
from wantrain.doctor.training import check_training
from wantrain.util.console import say

#: The checks by name, in their order: settings/schema.py has the names.
CHECKS: Mapping[str, Callable[[Options], Iterator[Finding]]] = {
    "python": check_python,
    "packages": check_packages,
    "extras": check_extras,
    "compiler": check_compiler,
    "build_locks": check_build_locks,
    "card": check_card,
    "attention": check_attention,
    "memory": check_memory,
    "shared_memory": check_shared_memory,
    "disk": check_disk,
    "hub": check_hub,
    "wandb": check_wandb,
    "training": check_training,
}

__all__ = ["CHECKS", "Finding", "Options", "examine"]


def examine(options: Options, names: Sequence[str] = ()) -> None:
    """Make the checks of these names, or all, and print a line for each finding.

    ValueError if something is broken that training needs.
    """
    findings: list[Finding] = []
    for name in names or CHECKS:
        findings.extend(_said(CHECKS[name](options)))
    broken = [finding for finding in findings if finding.broken]
    notes = sum(bool(finding.fix) for finding in findings) - len(broken)
    say(f"{len(findings)} lines: {len(findings) - notes - len(broken)} ok, {notes} notes, {len(broken)} broken")
    if broken:
        about = ", ".join(dict.fromkeys(finding.about for finding in broken))
        raise ValueError(f"training needs what is broken here: {about}; the lines marked BROKEN end in the fix")


def _said(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Each finding, printed as it comes."""
    for finding in findings:
        say(finding.line())
        yield finding
