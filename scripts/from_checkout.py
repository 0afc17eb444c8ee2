"""Runs a module with the package importable from this checkout, without installing anything.

    python3 scripts/from_checkout.py pytest --gpu -m gpu tests/gpu
    python3 scripts/from_checkout.py benchmarks.gpu.paged_attention --quick

For a machine whose Python already has JAX for its GPU and must stay as it is. The dependencies have to be there.
"""

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# As in setup.py: the source folders lie at the root and import under jaxpaged.
FOLDERS = {
    "jaxpaged": "jaxpaged",
    "jaxpaged.models": "models",
    "jaxpaged.pallas_kernels": "pallas_kernels",
    "jaxpaged.serve": "serve",
}


class CheckoutFinder:
    """Finds the packages of ``FOLDERS``; what is inside of them, Python finds by itself."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of our packages, or None."""
        del path, target
        if name not in FOLDERS:
            return None
        folder = ROOT / FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def main() -> None:
    """Runs the module named first, with the rest as its arguments."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.meta_path.insert(0, CheckoutFinder)
    sys.path[0] = str(ROOT)  # instead of this script's folder
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
