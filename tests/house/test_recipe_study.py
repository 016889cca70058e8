"""docs/recipes.md shows the table that benchmarks/recipe_study.py makes of what it measured."""

import json
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(monkeypatch):
    """The benchmark as a module; scripts of that folder import each other by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("recipe_study")


@pytest.fixture
def runs():
    return json.loads((ROOT / "benchmarks" / "recipe_study.json").read_text(encoding="utf-8"))["runs"]


def test_table_of_page(study, runs):
    """The page's table is that of the results, all settings with all seeds."""
    assert runs.keys() == {f"{name}, seed {seed}" for name in study.CHOICES for seed in study.SEEDS}
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert study.table(runs) in page, f"the page should have\n{study.table(runs)}"
    assert f"images/{study.PICTURE.name}" in page and study.PICTURE.is_file()


def test_intervals(study):
    """Student's t over three seeds: 4.303 standard errors; a judged share's is at least one prompt's."""
    middle, reach = study.interval([0.1, 0.2, 0.3])
    assert (middle, reach) == pytest.approx((0.2, 4.3027 * 0.1 / 3**0.5), rel=1e-4)
    runs = {
        f"{name}, seed {seed}": {"wug": 0.5 + 0.1 * (name != study.BASE)}
        for name in (study.BASE, "rank 2")
        for seed in study.SEEDS
    }
    assert study.against_base(runs, "rank 2", "wug") == pytest.approx((0.1, 0.05))
    assert study.shown(0.1, 0.05) == "**+10 ± 5**" and study.shown(-0.05, 0.051, unit=" %") == "−5 ± 5 %"
