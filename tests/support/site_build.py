"""The documents as a site, built as `make docs` builds it."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build_site(folder):
    """Build the site into a folder, which is returned; any warning is an error. Skips where mkdocs is not installed."""
    for library in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(library, reason=f"{library} is not installed, so no site can be built: make install")
    build, config = importlib.import_module("mkdocs.commands.build"), importlib.import_module("mkdocs.config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(folder)
        settings = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        settings.plugins.on_startup(command="build", dirty=False)
        build.build(settings)
    return folder
