"""The field's words: names of before are gone from product files, but for the one table that knows them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: The table of old names, which a command refuses and a reader of old files translates.
TABLE = ROOT / "wantrain/util/renamed.py"
CODE = [*sorted((ROOT / "wantrain").rglob("*.py")), *sorted(ROOT.glob("*.py")), *sorted((ROOT / "assets").glob("*.py"))]
TEXT = [
    *CODE,
    *sorted((ROOT / "conf").rglob("*.yaml")),
    *sorted((ROOT / "launch").rglob("*.*")),
    *(path for path in sorted(ROOT.rglob("*.md")) if ".venv" not in path.parts and "golden" not in path.parts),
]

#: Words that no product file has, in any sense.
GONE = (
    r"told_by", r"\btold\b", r"\bTold\b", r"\bMember\b", r"\bTrainee\b", r"\btrainees?\b", r"\bTurns\b", r"\bHome\b",
    r"\bHouse\b", r"\bResidence\b", r"\bHosted\b", r"\bAttendance\b", r"\battendance\b", r"\bLedger\b", r"\bledger\b",
    r"\b[Tt]ripwires?\b", r"\bwires\b", r"\bUsual\b", r"\brulers?\b", r"\benlist\b", r"\bwiden\b", r"\bsittings?\b",
    r"\b_Weave\b", r"\blaps?\b", r"\bverbs?\b", r"\bmends?\b", r"\bmended\b", r"\blaws?\b", r"\bwhat is known\b",
    r"validation\.stop_after", r"\btripped\.jsonl\b",
)  # fmt: skip
#: Words that stay as English but are no names: of a function, class, argument or variable.
NO_NAMES = {
    "way", "ways", "known", "told", "guards", "Start", "Found", "Asked", "Kept", "Behind", "Look", "looks", "Mark", "marks",
    "Probe", "Reading", "readings", "patience", "beat", "idle", "settled", "room", "door", "law", "residence", "house",
}  # fmt: skip


def name_of(file):
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", TEXT, ids=name_of)
def test_old_words(file):
    if file == TABLE or file.suffix not in {".py", ".yaml", ".md", ".sh"}:
        return
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [f"{n}: {line.strip()}" for n, line in enumerate(lines, 1) for word in GONE if re.search(word, line)]
    assert found == []


@pytest.mark.parametrize("file", CODE, ids=name_of)
def test_old_names(file):
    if file == TABLE:
        return
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    assert found & NO_NAMES == set()
