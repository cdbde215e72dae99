"""The notebooks: nothing stored in them, and each cell runs, quietly, from a fresh clone."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_model.ipynb"
EXPECTED = ("`LightningModule.configure_optimizers` returned `None`", "in eval mode at the start of training")
"""What Lightning says of each model that learns in one pass, anomalib's PatchCore too."""


def test_nothing_is_stored() -> None:
    """A valid notebook without outputs, counts, or paths of the machine that it was written on."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count, dict(cell.metadata)) for cell in cells] == [([], None, {})] * len(
        cells
    )
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/|[A-Z]:\\\\", NOTEBOOK.read_text())


@pytest.mark.slow
def test_the_first_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, warns of nothing new and leaves nothing where the notebook lies; exports agree with torch."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    warned = "".join(output.text for output in outputs if output.get("name") == "stderr").splitlines()
    assert [line for line in warned if not any(text in line for text in EXPECTED)] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert list(work.iterdir()) == []
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert float(re.search(r"image_AUROC +([\d.]+)", printed)[1]) > 0.95
    assert re.search(r"defective: (\d+) of \1 called anomalous", printed)
    assert float(re.search(r"largest difference: (\S+)", printed)[1]) < 1e-4
