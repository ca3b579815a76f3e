"""The pages in docs/ list what the registries hold, and the commands in the docs parse.

tests/test_docs_commands.py runs them.
"""

import importlib.util
import re
import shlex
import sys
from dataclasses import fields
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


def anchors(page: str) -> list[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


# An agent, a study and a rule have a page each. The six norms are sections of one page: they are
# short, and a reader compares them.
@pytest.mark.parametrize("name", [*AGENTS, *STUDIES])
def test_each_agent_and_study_has_its_page(name: str) -> None:
    assert (DOCS / f"{name}.md").is_file()
    overview = "agents.md" if name in AGENTS else "studies.md"
    assert f"[`{name}`]({name}.md)" in (DOCS / overview).read_text(encoding="utf-8")


def test_each_norm_has_its_section() -> None:
    assert [anchor for anchor in anchors("layers.md") if anchor in KINDS] == list(KINDS)
    text = (DOCS / "layers.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.M)[2:7]:
        assert all(word in section for word in ("**When:**", "**Options:**", "**Tested**"))


def test_files_that_pages_name_exist() -> None:
    """A test or a source file that a page names is there, and so is an anchor that it links."""
    for page in [*DOCS.glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`((?:tests|src|benchmarks)/[\w/]+\.(?:py|md))`", text)
        assert [name for name in named if not (ROOT / name).exists()] == [], page.name
        for target, anchor in re.findall(r"\]\(([\w-]*\.md)?#([\w-]+)\)", text):
            assert anchor in anchors(target or page.name), (page.name, target, anchor)


@pytest.mark.parametrize("name", ["td3", "sac"])
def test_settings_pages_give_the_defaults(name: str) -> None:
    config = AGENTS[name].Config()
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|$", text, re.M))
    settings = {field.name for field in fields(config)} - {"actor", "critic", "plan"}
    assert rows == {setting: str(getattr(config, setting)) for setting in settings}


def test_pictures_of_slots_and_modes_are_what_their_script_draws() -> None:
    script = script_of("draw_slots")
    for name, draw in script.PICTURES.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == draw(), (
            "run: python benchmarks/draw_slots.py"
        )


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
    cli.parser().parse_args(shlex.split(command, comments=True)[1:])


def script_of(name: str):
    """A script in benchmarks/, as a module. Scripts import each other by name."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill_docs():
    """The script that fills the documentation's tables."""
    return script_of("fill_docs")


@pytest.mark.parametrize("page", fill_docs().TABLES)
def test_tables_of_results_are_those_of_the_results_folder(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert fill_docs().filled(page, text) == text, "run: python benchmarks/fill_docs.py"
