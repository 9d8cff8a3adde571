"""The notebook of examples/, run by a kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
QUIET = 'saetrain.fit("shuffled.zarr", k=6, d_sae=96, batch_size=256, steps=4, out="quiet", progress=False)'
LOUD = """from actshuffle.progress import display
display.PATIENCE = 0
actshuffle.verify("rows.zarr", "shuffled.zarr")"""


def streams(cell: Any, name: str) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == name)


@pytest.mark.filterwarnings("ignore")  # those of Jupyter
def test_notebook_trains_plots_loads_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(ROOT / "examples" / "train.ipynb", as_version=4)
    kept = [c for c in notebook.cells if c.cell_type == "code" and (c.outputs or c.execution_count)]
    assert kept == [], "outputs belong to whoever runs the notebook"
    more = [nbformat.v4.new_code_cell(text) for text in (QUIET, LOUD, LOUD.replace('")', '", progress=False)'))]
    notebook.cells += more
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    _, fit, plot, load, match, report, quiet, loud, still = cells
    assert "200/200" in streams(fit, "stdout")
    assert "step/s" in streams(fit, "stderr"), "no bar"
    assert "ipywidgets" not in streams(fit, "stderr"), "a bar of text is no reason to warn"
    assert any("image/png" in output.get("data", {}) for output in plot.outputs)
    assert "eval_fvu" in plot.outputs[0].data["text/plain"]
    assert re.search(r"[3-6]\.\d active latents a row, FVU 0\.[01]", streams(load, "stdout"))
    assert int(streams(match, "stdout").split()[0]) > 40
    assert "report.html" in report.outputs[0].data["text/plain"]
    assert (tmp_path / "run" / "report.html").exists()
    assert streams(quiet, "stdout") + streams(quiet, "stderr") == ""
    assert "\rverify " in streams(loud, "stderr") or "verify  " in streams(loud, "stderr")
    assert "100%" in streams(loud, "stderr")
    assert streams(still, "stderr") == ""
