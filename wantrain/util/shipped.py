"""Where the files lie that come with the package: commands, configs, launch files, the small model.

In a checkout, also one that is installed editable, they lie beside the package; in a wheel inside it (`setup.py`).
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "project"

#: The folder with train.py, conf/, launch/ and assets/wan-tiny/.
ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
