"""The documentation's commands and Python blocks run, page by page, in order, in an empty folder.

Covered: README.md and every page in docs/ (rule pages apart, whose commands are one template) that
shows a ```console or a ```python block. A page's blocks share one folder and one set of Python
names, so that later ones find what earlier ones left. Of console blocks the `$ batchproof` lines
are run; `$ make`, `$ pip` and benchmarks have their own tests or none.

- A block that cannot run here stands behind ``<!-- not run: REASON -->``.
- ``# exit code 1`` behind a command says with which code it ends; otherwise it is 0, or for `audit`
  and `fix`, which may find something, 0 or 1.
- `shortened` cuts the length of trainings, and a study or a comparison on a cluster is only parsed:
  tests/study and tests/compare run a small version of each. ``learn`` of Stable-Baselines3 is cut
  too, but on `AS_WRITTEN` pages, which show trainings of seconds.
- What a page supposes its reader to have, such as a trained model, comes from `GIVEN`.
- `QUICK` pages belong to the default run, the others to ``make test-full``.
"""

import re
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchproof import cli
from batchproof.lab.agents import AGENTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
AS_WRITTEN = re.compile(r"(start|concepts|modes|howto-.*)\.md")
QUICK = ("concepts.md", "modes.md", "statistics.md")

STEPS, SEEDS, LEARN = 300, 2, 300  # what trainings are cut to


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line, language, text, and why it is not run."""

    page: str
    line: int
    kind: str
    body: str
    not_run: str | None


def blocks_of(path: Path) -> list[Block]:
    found: list[Block] = []
    body: list[str] | None = None
    kind, start, note = "", 0, None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"```(\w*)", line)
        if body is not None:
            if fence:
                found.append(Block(path.name, start, kind, "\n".join(body) + "\n", note))
                body, note = None, None
            else:
                body.append(line)
        elif fence:
            kind, start, body = fence.group(1), number, []
        elif line.strip():
            mark = re.fullmatch(r"<!-- not run: (.+) -->", line.strip())
            note = mark.group(1) if mark else None
    return [block for block in found if block.kind in ("console", "python")]


PAGES = {
    path.name: blocks
    for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    if (blocks := blocks_of(path))
}


# --- what a page supposes that its reader has ---------------------------------------------------


def td3(path: str | None = None) -> Any:
    """Stable-Baselines3's TD3 with batch norm in its critics, barely trained on Pendulum."""
    from stable_baselines3 import TD3

    from batchproof.sb3.policies import NormTD3Policy

    kwargs = {"critic_norm": "batch", "net_arch": [16, 16]}
    model = TD3(
        NormTD3Policy, "Pendulum-v1", policy_kwargs=kwargs, learning_starts=40, batch_size=16,
        device="cpu", seed=0,
    )  # fmt: skip
    model.learn(80)
    if path is not None:
        Path(path).parent.mkdir(exist_ok=True)
        model.save(path)
    return model


def networks() -> dict:
    """A subject's parts, as audit.md, trace.md and fix.md name them."""
    from batchproof.sb3 import subject_from_model

    model = td3("td3.zip")
    subject = subject_from_model(model)
    roles = {role: subject.networks[role] for role in ("actor", "critic", "critic_target")}
    deployed = model.actor.eval()

    def train_once() -> None:
        model.policy.set_training_mode(True)
        model.train(gradient_steps=2, batch_size=16)

    return {
        **roles, "obs": subject.obs, "transitions": subject.transitions, "policy": deployed,
        "subject": subject, "train_once": train_once,
    }  # fmt: skip


def two_runs() -> dict:
    """Runs for a report; the published ones without their checkpoints."""
    for name in ("a", "b"):
        run_command(f"batchproof train td3 --env Pendulum-v1 --hidden 8,8 --out runs/{name}")
    copytree(ROOT / "results" / "learning", "results/learning", ignore=lambda *_: ["checkpoint"])
    return {}


def an_export() -> dict:
    import gymnasium

    return {"env": gymnasium.make("Pendulum-v1"), "obs": torch.zeros(4, 3)}


def scores() -> dict:
    import numpy as np

    draw = np.random.default_rng(0)
    values = {name: draw.normal(size=(10, 2)) for name in ("scores", "a", "b")}
    return values | {"thresholds": np.linspace(-1, 1, 5)}


def a_policy_and_observations() -> dict:
    import numpy as np

    model = td3("models/policy.zip")
    np.save("models/obs.npy", model.replay_buffer.observations[:64, 0])
    return {}


def breakout() -> dict:
    from stable_baselines3 import PPO

    from batchproof.sb3 import NatureCNN, make_atari

    kwargs = {
        "features_extractor_class": NatureCNN,
        "features_extractor_kwargs": {"use_batch_norm": True},
    }
    env = make_atari("breakout", 2)
    model = PPO("CnnPolicy", env, n_steps=16, batch_size=16, policy_kwargs=kwargs)
    model.learn(32)
    model.save("breakout.zip")
    return {}


GIVEN: dict[str, Callable[[], dict]] = {
    "README.md": lambda: {"model": td3("model.zip")},
    "index.md": lambda: {"model": td3("model.zip")},
    "audit.md": networks,
    "trace.md": networks,
    "fix.md": networks,
    "export.md": an_export,
    "report.md": two_runs,
    "statistics.md": scores,
    "ci-example.md": a_policy_and_observations,
    "naturecnn-breakout.md": breakout,
}


# --- running ------------------------------------------------------------------------------------


def option(words: list[str], name: str, value: int, *, add: bool = False) -> None:
    """Lower a whole-number option of a command to ``value``; add it where it is not written."""
    if name in words:
        at = words.index(name) + 1
        # A list of seeds stays a list.
        words[at] = str(min(int(words[at]), value)) if words[at].isdigit() else words[at]
    elif add:
        words += [name, str(value)]


def shortened(words: list[str]) -> list[str] | None:
    """A short version of the words after `batchproof`; None where parsing is all that is done."""
    if words[0] == "study" or "--on" in words:
        return None
    if words[0] not in ("train", "compare"):
        return words
    words = [*words]
    option(words, "--steps", STEPS, add=True)
    option(words, "--seeds", SEEDS, add=words[0] == "compare")
    option(words, "--eval-episodes", 1, add=True)
    option(words, "--eval-every", STEPS // 2, add=True)
    option(words, "--buffer-size", 1000)
    replays = words[0] == "compare" or AGENTS[words[1]].STEPPER == "off_policy"
    option(words, "--learning-starts", 50, add=replays)
    option(words, "--update-every", 50)
    if words[1:2] == ["maddpg"]:  # a hundred steps between updates by default
        option(words, "--update-every", 50, add=True)
    return [*words, "--no-progress"]


def run_command(command: str) -> None:
    """Run one command as `batchproof` would, and hold it to the exit code that stands behind it."""
    words = shlex.split(command, comments=True)[1:]
    cli.parser().parse_args(words)
    short = shortened(words)
    if short is None:
        return
    told = re.search(r"#.*\bexit code (\d)", command)
    with redirect_stdout(StringIO()) as shown:
        code = cli.main(short)
    allowed = (int(told.group(1)),) if told else (0, 1) if short[0] in ("audit", "fix") else (0,)
    assert code in allowed, f"exit code {code}: {command}\n{shown.getvalue()}"


def run_python(block: Block, names: dict) -> None:
    body = block.body
    if not AS_WRITTEN.fullmatch(block.page):
        body = re.sub(
            r"\.learn\((\d[\d_]*)", lambda m: f".learn({min(int(m.group(1)), LEARN)}", body
        )
    # Line numbers of the page, so that a failure names its line.
    code = compile("\n" * block.line + body, str(DOCS / block.page), "exec")
    exec(code, names)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    copytree(DOCS / "examples", tmp_path / "docs" / "examples")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page in QUICK else pytest.mark.full) for page in PAGES],
)
@pytest.mark.filterwarnings("default")  # a reader sees a library's warning and goes on
def test_page_runs(page: str, empty_folder: Path) -> None:
    names = {"__name__": "__main__"} | (GIVEN[page]() if page in GIVEN else {})
    for block in PAGES[page]:
        if block.not_run is not None:
            continue
        if block.kind == "python":
            run_python(block, names)
            continue
        for line in block.body.splitlines():
            if line.startswith("$ batchproof"):
                run_command(line.removeprefix("$ "))


# --- the rules above ----------------------------------------------------------------------------


def test_pages_named_here_exist() -> None:
    assert set(QUICK) | set(GIVEN) <= set(PAGES)


def test_a_mark_counts_for_the_next_block_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "<!-- not run: takes hours -->\n\n```console\n$ batchproof modes\n```\n"
        "words\n```python\nx = 1\n```\n```text\nno code\n```\n"
    )
    first, second = blocks_of(path)
    assert (first.kind, first.not_run) == ("console", "takes hours")
    assert (second.body, second.not_run) == ("x = 1\n", None)


def test_trainings_are_cut_and_nothing_else() -> None:
    task = ["train", "sac", "--env", "Pendulum-v1", "--seeds", "0,3"]
    cut = ["--steps", "300", "--eval-episodes", "1", "--eval-every", "150"]
    added = ["--learning-starts", "50", "--no-progress"]
    assert shortened([*task, "--steps", "9000"]) == [*task, *cut, *added]
    assert shortened(["audit", "td3.zip"]) == ["audit", "td3.zip"]
    assert shortened(["study", "constant-reward", "--out", "x"]) is None


def test_an_exit_code_is_held(empty_folder: Path) -> None:
    run_command("batchproof audit nowhere.zip --env Pendulum-v1  # exit code 2")
    with pytest.raises(AssertionError, match="exit code 2"):
        run_command("batchproof audit nowhere.zip --env Pendulum-v1")


# --- the notebook -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.filterwarnings("default")
def test_the_notebook_runs(empty_folder: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("notebook", ROOT / "benchmarks" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = module.execute(module.read())
    results = SimpleNamespace(**names["results"])
    assert results.gap_alone > 0.1
    assert results.kappa_T < 1e-5 < 0.01 < results.kappa_E
    assert results.collapsed < 15 < 24 < results.cured


def test_the_notebook_is_small_and_has_been_run() -> None:
    import json

    path = DOCS / "notebook" / "batch-norm-in-rl.ipynb"
    assert path.stat().st_size < 300_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in o.get("data", {}) for c in code for o in c["outputs"]) >= 2
