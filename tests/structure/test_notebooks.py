"""The two halves of a jupytext pair say the same; the notebooks themselves are executed by nbmake."""

import jupytext
import pytest

from tests.support.repository import ROOT, python_files


def test_notebook_pairs_agree() -> None:
    different = []
    for path in python_files("notebooks"):
        pair = path.with_suffix(".ipynb")
        if not (ROOT / pair).is_file():
            pytest.fail(f"{path} has no {pair.name}: run `make notebook`")
        script, notebook = (jupytext.read(ROOT / name).cells for name in (path, pair))
        if [(c.cell_type, c.source) for c in script] != [(c.cell_type, c.source) for c in notebook]:
            different.append(f"{path} and {pair.name}: run `make notebook`")
    assert different == []
