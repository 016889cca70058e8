"""One step more than pyproject.toml can say: a wheel carries what lies beside the package in a checkout.

It goes to wantrain/project, where wantrain/util/shipped.py looks for it.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

#: The commands, their configs, the launch files, and the model of the demo.
SHIPPED = ("*.py", "conf/**/*.yaml", "launch/**/*", "assets/wan-tiny/**/*")


class BuildWithProject(build_py):
    """Python files as ever, then the project's own; an editable install reads those of the checkout."""

    def run(self) -> None:
        """Copy them into the folder that becomes the wheel."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "wantrain", "project")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build, of files that may be gone
        for file in sorted(file for pattern in SHIPPED for file in Path().glob(pattern)):
            if file.is_file() and file.name != "setup.py":
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / file)


setup(cmdclass={"build_py": BuildWithProject})
