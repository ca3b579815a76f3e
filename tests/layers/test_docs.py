"""docs/torch-layers.md: its code runs and its tables are the registries."""

import re
from pathlib import Path

from batchproof.layers import CONVENTIONS, LAYERS, BatchRenorm1d

TEXT = (Path(__file__).parents[2] / "docs" / "torch-layers.md").read_text(encoding="utf-8")


def rows(header):
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip(" `") for cell in line.strip("|").split("|")])
    return [found[0], *found[2:]]


def test_the_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:
        exec(block, namespace)


def test_the_registry_is_listed():
    assert [row[0] for row in rows("name")[1:]] == list(LAYERS)


def test_the_conventions_are_listed():
    header, *table = rows("option")
    assert [name.split("`")[0] for name in header[2:]] == list(CONVENTIONS)
    default = BatchRenorm1d(3)
    options = {**vars(default.renorm), **vars(default)}
    for name, ours, *theirs in table:
        assert str(options[name]) in (ours, str(float(ours) if ours[0].isdigit() else ours))
        for source, value in zip(CONVENTIONS, theirs, strict=True):
            expected = CONVENTIONS[source][name]
            assert value == expected if isinstance(expected, str) else float(value) == expected
