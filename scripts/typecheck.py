"""Runs mypy on the package as it is imported.

The source folders lie at the repository root and import under ``jaxpaged.*``; a type checker cannot follow the
mapping of ``setup.py``. So a tree of symbolic links in ``.typecheck/`` (ignored by git) shows it that shape.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".typecheck"
INNER_FOLDERS = ("models", "pallas_kernels", "serve")


def link_tree() -> None:
    """Builds ``.typecheck/jaxpaged`` anew: links to the files of ``jaxpaged/`` and to the inner folders."""
    package = TREE / "jaxpaged"
    shutil.rmtree(TREE, ignore_errors=True)
    package.mkdir(parents=True)
    sources = [path for path in (ROOT / "jaxpaged").iterdir() if path.name != "__pycache__"]
    for source in sources + [ROOT / folder for folder in INNER_FOLDERS]:
        (package / source.name).symlink_to(os.path.relpath(source, package))


def real_paths(report: str) -> str:
    """The report with paths that an editor can open: those of the sources, not of the links."""
    inner = "|".join(INNER_FOLDERS)
    report = re.sub(rf"^\.typecheck/jaxpaged/({inner})/", r"\1/", report, flags=re.MULTILINE)
    return re.sub(r"^\.typecheck/", "", report, flags=re.MULTILINE)


def main() -> int:
    """Returns mypy's exit status."""
    link_tree()
    command = [sys.executable, "-m", "mypy", *sys.argv[1:]]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(real_paths(result.stdout), end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
