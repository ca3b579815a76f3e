"""Run the teachers' notebook and keep what its cells print and draw.

    python benchmarks/notebook.py

runs docs/notebook/batch-norm-in-rl.ipynb from top to bottom in one set of names, in a folder that
is thrown away, and writes its outputs into the file. It needs no notebook server. A test runs the
same cells.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook" / "batch-norm-in-rl.ipynb"
DPI = 80  # the pictures stay under 200 KB together


def read() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells in order, put their outputs into ``notebook``, and return the names."""
    import matplotlib

    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        source = compile("".join(cell["source"]), f"cell {number}", "exec")
        with redirect_stdout(StringIO()) as shown:
            exec(source, names)
        printed = shown.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = pictures()
        if printed:
            cell["outputs"].insert(0, {"name": "stdout", "output_type": "stream", "text": printed})
    return names


def pictures() -> list[dict[str, Any]]:
    """The open figures as a notebook's outputs; they are closed, as a notebook does."""
    from matplotlib import pyplot

    outputs = []
    for number in pyplot.get_fignums():
        file = BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=DPI, bbox_inches="tight")
        png = base64.b64encode(file.getvalue()).decode()
        outputs.append({"data": {"image/png": png}, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    return outputs


def main() -> None:
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        execute(notebook)
        os.chdir("/")
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    NOTEBOOK.write_text(text, encoding="utf-8")
    print(f"{NOTEBOOK}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
