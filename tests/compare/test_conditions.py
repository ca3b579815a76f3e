"""What is in the grid of a comparison, from flags and from a file, and in which order it runs."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchproof import compare
from batchproof.cli import main, parser
from batchproof.cli.train import training_of
from batchproof.compare import conditions, populations, work
from batchproof.errors import BatchproofError

ENV = "batchproof/ConstantReward-v0"


def names(found: compare.Grid) -> list[str]:
    return [condition.name for condition in found.conditions]


def test_the_grid_holds_every_combination_once(grid: Callable[[str], compare.Grid]) -> None:
    found = grid(
        f"--algo td3,sac --env {ENV} --norm none,batch,layer --placement pre,post "
        "--modes default,TEETE"
    )
    assert names(found) == [
        f"{algo}-{rest}"
        for algo in ("td3", "sac")
        for rest in (
            "none",
            "batch-pre",
            "batch-pre-TEETE",
            "batch-post",
            "batch-post-TEETE",
            "layer-pre",
            "layer-post",
        )
    ]
    assert not found.left_out
    # Each thing that has no effect is told with the conditions that it concerns.
    assert found.notes["--placement has no effect without a norm"] == ["td3-none", "sac-none"]
    assert any("layer" in name for held in found.notes.values() for name in held)


def test_equal_conditions_are_one(grid: Callable[[str], compare.Grid]) -> None:
    found = grid(f"--algo td3 --env {ENV} --norm default,none,batch --modes default,sb3-td3,TETTE")
    assert names(found) == ["td3", "td3-batch"]
    assert "td3-none is the same as td3" in found.notes
    assert "td3-batch-TETTE is the same as td3-batch" in found.notes


def test_what_cannot_be_trained_is_left_out_with_its_reason(
    grid: Callable[[str], compare.Grid],
) -> None:
    found = grid(
        f"--algo td3,reinforce --env {ENV} --norm batch --placement pre,before-action --hidden 8 "
        "--modes TEETE,TEETM"
    )
    assert names(found) == ["td3-batch-pre-TEETE"]
    why = {name: reason for reason, held in found.left_out.items() for name in held}
    assert "slot 3 only" in why["td3-batch-pre-TEETM"]
    assert "two hidden layers" in why["td3-batch-before-action-TEETE"]
    assert "REINFORCE has no critic" in why["reinforce-batch-pre-TEETE"]
    for line in found.lines():
        assert "\n" not in line


def test_an_option_reaches_the_conditions_where_it_has_an_effect(
    grid: Callable[[str], compare.Grid],
) -> None:
    found = grid(f"--algo td3 --env {ENV} --norm none,layer,batch --momentum 0.5 --eps 1e-3")
    words = {condition.name: " ".join(condition.words) for condition in found.conditions}
    assert words["td3-none"] == "td3 --norm none"
    assert words["td3-layer"] == "td3 --norm layer --eps 1e-3"
    assert words["td3-batch"] == "td3 --norm batch --momentum 0.5 --eps 1e-3"
    with pytest.raises(BatchproofError, match="--momentum has no effect without a norm"):
        grid(f"--algo td3,sac --env {ENV} --momentum 0.5")


def test_settings_reach_the_algorithms_that_have_them(grid: Callable[[str], compare.Grid]) -> None:
    found = grid(f"--algo td3,sac --env {ENV} --set policy_delay=1 --set critics=3")
    words = {condition.name: " ".join(condition.words) for condition in found.conditions}
    assert words["td3"] == "td3 --set policy_delay=1 --set critics=3"
    assert words["sac"] == "sac --set critics=3"
    assert found.notes == {"--set policy_delay: sac has no such setting": ["sac"]}
    with pytest.raises(BatchproofError, match="--set taau: td3 has no such setting: did you mean"):
        grid(f"--algo td3,sac --env {ENV} --set taau=1 --set critics=3")


def test_a_condition_s_own_settings_stand_before_the_shared_ones_of_the_same_name(
    grid: Callable[[str], compare.Grid], tmp_path: Path
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        f'algo = "td3"\nenv = "{ENV}"\n[set]\ncritics = 1\ntau = 0.1\n'
        '[[condition]]\nname = "own"\nalgo = "td3"\nnorm = "critic:batch"\nset = {tau = 0.5}\n'
    )
    by_name = {condition.name: condition.words for condition in grid(str(path)).conditions}
    own = "td3 --actor-norm none --critic-norm batch --set tau=0.5 --set critics=1"
    assert by_name["own"] == tuple(own.split())


@pytest.mark.parametrize(
    ("condition", "part"),
    [
        ('name = "a"\nalgo = "td9"', "condition a: argument ALGO: unknown algorithm 'td9'"),
        ('name = "a"\nalgo = "td3"\nnorm = "critics:batch"', "unknown network 'critics'"),
        ('name = "td3-critic-batch"\nalgo = "td3"', "would have one folder, td3-critic-batch"),
    ],
)
def test_a_condition_that_was_written_out_is_not_left_out(
    condition: str, part: str, grid: Callable[[str], compare.Grid], tmp_path: Path
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        f'algo = "td3"\nenv = "{ENV}"\nnorm = "critic:batch"\n[[condition]]\n{condition}'
    )
    with pytest.raises(BatchproofError, match=re.escape(part)):
        grid(str(path))


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "../up", "a/../b"])
def test_no_name_leads_out_of_its_folder(name: str) -> None:
    assert (Path("cells") / conditions.slug(name)).resolve().parent == Path("cells").resolve()
    assert not conditions.slug(name).startswith(".")


def test_a_norm_can_sit_in_one_network_alone(grid: Callable[[str], compare.Grid]) -> None:
    found = grid(f"--algo crossq:wn --env {ENV} --norm default,critic:layer --placement post")
    by_name = {condition.name: condition for condition in found.conditions}
    assert list(by_name) == ["crossq:wn-post", "crossq:wn-critic:layer-post"]
    args = parser().parse_args(
        ["train", *by_name["crossq:wn-critic:layer-post"].words, "--env", ENV, "--out", "never"]
    )
    assert (args.preset, args.actor_norm, args.critic_norm) == ("wn", "none", "layer")
    assert (args.critic_placement, args.placement) == ("post", None)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--env E", "--algo"),
        ("--algo td3", "--env"),
        ("--algo ppo --env E", "unknown algorithm 'ppo'"),
        ("--algo crossq:nw --env E", "crossq has crossq, sb3-contrib, wn"),
        ("--algo td3 --env E --norm bach", "unknown norm 'bach'"),
        ("--algo td3 --env E --norm critics:batch", "unknown network 'critics'"),
        ("--algo td3 --env E --norm critic:batch+critic:layer", "names no network, or one twice"),
        ("--algo td3 --env E --modes TEXTE", "unknown mode plan 'TEXTE'"),
        ("--algo td3 --env E --norm batch --modes TEETM", "nothing is left to compare"),
        ("--algo td3 --env E --budget 30", "'30' is not a time: write for example 90s"),
        ("--algo td3 --env E --baseline sac", "--baseline sac is no condition: use one of td3"),
        ("--algo td3 --env E --steps 1e3", "'1e3' is not a whole number"),
        ("--algo td3 --env Nope-v0", "unknown environment 'Nope-v0'"),
        ("nowhere.toml", "nowhere.toml: No such file"),
    ],
)
def test_a_mistake_is_one_line(
    words: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *shlex.split(words), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_baselines_come_first_and_no_condition_waits_for_anothers_later_seeds(
    grid: Callable[[str], compare.Grid], tmp_path: Path
) -> None:
    kept: list[Any] = []

    def build(words: Any) -> Any:
        args = parser().parse_args(["train", *words, "--out", "never"])
        return training_of(args, {})

    spec = compare.Spec(
        algos=("crossq", "td3"),
        envs=(ENV, "Pendulum-v1"),
        norms=("batch", "none"),
        shared=(("--hidden", "8,8"),),
        seeds=(0, 1, 2),
        at_once=2,
    )
    chosen = compare.grid(spec, build).conditions
    kept = compare.ordered(compare.cells(spec, chosen, tmp_path, build))
    shown = [(cell.env, cell.condition.name, p.training.seeds) for cell, p in kept]
    # The algorithms' nets are of one size here, and td3 has one update a step like crossq.
    once = [
        (env, name, (0, 1))
        for env in (ENV, "Pendulum-v1")
        for name in ("crossq-none", "td3-none", "crossq-batch", "td3-batch")
    ]
    assert shown == once + [(env, name, (2,)) for env, name, _ in once]


def test_a_file_says_what_flags_say(
    grid: Callable[[str], compare.Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        f"""
        algo = ["td3", "sac"]
        env = "{ENV}"
        norm = ["none", "critic:batch"]
        modes = ["default", "TEETE"]
        steps = 400
        learning-starts = 100
        hidden = [8, 8]
        learning_rate = 1e-3
        seeds = [3]
        project-weights = true
        host-env = false
        [env-option]
        ending = "truncated"
        [[condition]]
        name = "wn"
        algo = "crossq"
        preset = "wn"
        hidden = [16]
        """
    )
    specs = []
    monkeypatch.setattr(compare, "listing", lambda spec, *_: specs.append(spec) or "")
    flags = (
        f"compare --algo td3,sac --env {ENV} --norm none,critic:batch "
        "--modes default,TEETE --list --steps 400 --learning-starts 100 --hidden 8,8 --seeds 3, "
        """--learning-rate 0.001 --project-weights --env-option 'ending="truncated"'"""
    )
    assert main(shlex.split(flags)) == 0
    assert main(["compare", str(path), "--list"]) == 0
    assert main(["compare", str(path), "--list", "--steps", "500"]) == 0
    by_flags, by_file, later = specs
    assert by_file.extra == (("wn", "crossq", (("--preset", "wn"), ("--hidden", "16"))),)
    assert set(by_file.shared) == set(by_flags.shared)
    for name in ("algos", "envs", "norms", "placements", "modes", "seeds", "at_once"):
        assert getattr(by_file, name) == getattr(by_flags, name)
    assert by_file.seeds == (3,)
    # A flag beside the file wins.
    assert ("--steps", "500") in later.shared
    assert ("--steps", "400") not in later.shared

    found = grid(shlex.quote(str(path)))
    extra = found.conditions[-1]
    assert (extra.name, extra.algo) == ("wn", "crossq")
    # Its own width stands before the one for all.
    assert extra.words[:5] == ("crossq", "--preset", "wn", "--hidden", "16")
    assert "8,8" not in extra.words


def test_environments_can_have_lengths_and_options_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        f"""
        algo = "td3"
        norm = ["none", "batch"]
        seeds = 1
        steps = 400
        learning-starts = 100
        [env-option]
        g = 9.0
        [[environment]]
        id = "{ENV}"
        steps = 120
        learning-starts = 20
        env-option = {{g = 1.0, ending = "truncated"}}
        [[environment]]
        id = "Pendulum-v1"
        """
    )
    kept = []

    def run(spec: compare.Spec, out: Path, build: compare.Build, **_: Any) -> dict[str, Any]:
        found = compare.cells(spec, compare.grid(spec, build).conditions, out, build)
        kept.extend((cell, population) for cell in found for population in cell.populations)
        raise BatchproofError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run", run)
        for more in ([], ["--env", "Pendulum-v1"]):
            assert main(["compare", str(path), "--out", str(tmp_path / "out"), *more]) == 2
    shown = [
        (cell.env, cell.condition.name, p.training.steps, p.training.learning_starts)
        for cell, p in kept
    ]
    pendulum = [("Pendulum-v1", name, 400, 100) for name in ("td3-none", "td3-batch")]
    own = [(ENV, name, 120, 20) for name in ("td3-none", "td3-batch")]
    assert shown == [*own, *pendulum, *pendulum]
    assert kept[0][1].training.env_options == {"g": 1.0, "ending": "truncated"}
    assert kept[2][1].training.env_options == {"g": 9.0}
    # The command of a population is one that trains it.
    command = work.train_command(*kept[0])
    args = parser().parse_args(shlex.split(command)[1:])
    assert training_of(args, dict(args.env_option)) == kept[0][1].training
    assert main(["compare", str(path), "--list"]) == 0
    assert f"{ENV}: --steps 120 --learning-starts 20" in capsys.readouterr().out


def test_the_example_of_the_docs_is_what_its_page_shows(
    grid: Callable[[str], compare.Grid],
) -> None:
    docs = Path(__file__).parents[2] / "docs"
    path = docs / "examples" / "compare.toml"
    found = grid(shlex.quote(str(path)))
    page = (docs / "compare.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (td3-[^ |]+) \| 5 \|", page, re.MULTILINE)
    assert names(found) == rows
    assert not found.left_out
    shown = tomllib.loads(page.split("```toml\n")[1].split("```")[0])
    assert shown == tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("algo = 'td3", "not a TOML file"),
        ("nrom = 'batch'", "unknown key nrom: use some of algo, env, norm"),
        ("list = 1", "expected true or false"),
        ("steps = true", "expected a value"),
        ("condition = 3", "two brackets"),
        ("[[condition]]\nalgo = 'td3'", "needs algo = ... and name"),
        ("[[condition]]\nalgo = 'td3'\nname = 'a'\nsteps = 3", "unknown key steps"),
        ("environment = 3", "two brackets"),
        ("[[environment]]\nsteps = 3", "needs id"),
        ("[[environment]]\nid = 'a'\nhidden = 3", "unknown key hidden"),
        ("[[environment]]\nid = 'a'\n[[environment]]\nid = 'a'", "stands there twice"),
    ],
)
def test_a_wrong_file_is_one_line(
    text: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert message.count("\n") == 1


def test_populations_of_one_cell_have_different_folders() -> None:
    lists = [(0,), (0, 1), (1, 2), (0, 2), tuple(range(0, 100, 2)), tuple(range(1, 100, 2))]
    folders = [populations.seeds_name(seeds) for seeds in lists]
    assert folders[:4] == ["seed-0", "seeds-0-1", "seeds-1-2", "seeds-0_2"]
    assert all(a != b for a, b in itertools.combinations(folders, 2))
    assert max(map(len, folders)) < 60
