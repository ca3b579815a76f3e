"""The tables in docs/ list what the registries hold, and the commands in the docs parse."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from batchproof import PRESETS, Mode, Plan, Slot, cli
from batchproof.lab.agents import AGENTS
from batchproof.lab.norms import KINDS, PLACEMENTS
from batchproof.study import STUDIES

DOCS = Path(__file__).parents[1] / "docs"
ROOT = DOCS.parent


def first_columns(page: str, header: str) -> list[str]:
    """First cells of the rows of the table whose header row starts with ``header``."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line.split("|")[1]).strip(" `"))
    return rows


@pytest.mark.parametrize(
    ("page", "header", "registry"),
    [
        ("layers.md", "norm", list(KINDS)),
        ("layers.md", "placement", list(PLACEMENTS)),
        ("agents.md", "agent", list(AGENTS)),
        ("studies.md", "study", list(STUDIES)),
        ("modes.md", "preset", list(PRESETS)),
        ("modes.md", "slot", [str(int(slot)) for slot in Slot]),
        ("modes.md", "letter", list("TESJMB")),
    ],
)
def test_table_lists_its_registry(page: str, header: str, registry: list[str]) -> None:
    assert first_columns(page, header) == registry


def test_presets_page_gives_the_plans() -> None:
    text = (DOCS / "modes.md").read_text(encoding="utf-8")
    for name, plan in PRESETS.items():
        assert f"| `{name}` | `{plan}` |" in text
        assert str(Plan.parse(name)) == plan


def test_modes_page_tells_what_each_letter_does() -> None:
    text = (DOCS / "modes.md").read_text(encoding="utf-8")
    for letter in "TESJMB":
        mode = Mode(letter)
        row = next(line for line in text.splitlines() if line.startswith(f"| `{letter}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert (cells[2] == "yes") == mode.gradient
        assert (cells[3] == "updated") == mode.updates


def shown_commands() -> list[str]:
    """Every batchproof command that the README or a page shows."""
    found = []
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for line in page.read_text(encoding="utf-8").splitlines():
            match = re.match(r"\$ (batchproof .*)", line.strip())
            if match:
                found.append(match.group(1))
    return found


@pytest.mark.parametrize("command", shown_commands())
def test_shown_command_parses(command: str) -> None:
    cli._parser().parse_args(shlex.split(command, comments=True)[1:])


def fill_docs():
    """The script that fills the documentation's tables, as a module."""
    spec = importlib.util.spec_from_file_location("fill_docs", ROOT / "benchmarks" / "fill_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", fill_docs().TABLES)
def test_tables_of_results_are_those_of_the_results_folder(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert fill_docs().filled(page, text) == text, "run: python benchmarks/fill_docs.py"
