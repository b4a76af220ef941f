"""The notebook in examples/ runs, and shows what it says."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


@pytest.fixture(scope="module")
def outputs():
    """What each code cell printed or showed, by kind."""
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute()
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = {}
            for output in cell.outputs:
                shown |= output.get("data", {output.get("name", ""): output.get("text", "")})
            found.append(shown)
    return found


def test_every_cell_shows_something(outputs):
    assert [at for at, shown in enumerate(outputs) if not shown] == []


def test_what_it_shows(outputs):
    requests, load, ranking, heatmap, tokens, mask, layers, experts = outputs
    assert "steered" in requests["text/plain"]
    assert "load" in load["text/plain"]
    assert "q_value" in ranking["text/plain"]
    assert "image/png" in heatmap
    assert len(tokens["stdout"].splitlines()) == 3
    assert mask["text/plain"].count("deactivate") == 4
    assert "by_chance" in layers["text/plain"]
    assert len(experts["text/plain"].splitlines()) == 1 + 4 + 2
