"""Maps the four source folders at the repository root to the one installed package ``jaxpaged``."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = {
    "jaxpaged": "jaxpaged",
    "jaxpaged.models": "models",
    "jaxpaged.pallas_kernels": "pallas_kernels",
    "jaxpaged.serve": "serve",
}


def package_folders() -> dict[str, str]:
    """Every package with its folder relative to the root; a folder is a package if it has an ``__init__.py``."""
    found = {}
    for name, folder in FOLDERS.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            inner = init.parent.relative_to(ROOT / folder).parts
            found[".".join([name, *inner])] = init.parent.relative_to(ROOT).as_posix()
    return found


setup(packages=list(package_folders()), package_dir=package_folders())
