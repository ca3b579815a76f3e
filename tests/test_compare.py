"""Comparisons: what is in the grid, what runs, what is kept, and what is said of it."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium import spaces
from jax.experimental.compilation_cache import compilation_cache

from batchproof import compare
from batchproof.cli import _parser, main
from batchproof.errors import BatchproofError
from batchproof.lab import loop, off_policy, population
from batchproof.lab.envs import host
from batchproof.study import statistics

ENV = "batchproof/ConstantReward-v0"
STEPS, EVERY = 120, 40
SIZES = (
    f"--hidden 8,8 --steps {STEPS} --learning-starts 20 --eval-every {EVERY} --eval-episodes 1 "
    "--batch-size 8 --no-progress"
)
SMALL = f"--algo ddpg --norm none,critic:batch {SIZES}"


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile each program once: a run is compiled anew otherwise, for seconds."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    over_seeds = population.over_seeds
    with pytest.MonkeyPatch.context() as patch:
        # These runs are so short that compiling fast is what counts.
        patch.setattr(
            population,
            "over_seeds",
            lambda *args, **rest: over_seeds(*args, **rest | {"rare": True}),
        )
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(words: str, out: Path, code: int = 0, env: str = ENV) -> dict[str, Any]:
    """What ``batchproof compare`` leaves in its record."""
    assert main(["compare", *shlex.split(words), "--env", env, "--out", str(out)]) == code
    return json.loads((out / "compare.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison that nothing disturbed: two conditions, seeds 0 and 1."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(f"{SMALL} --seeds 2", out)


def returns(record: dict[str, Any], env: str = ENV) -> dict[str, dict[str, float | None]]:
    return {
        cell["condition"]: cell["final_returns"]
        for cell in record["cells"]
        if cell["environment"] == env
    }


def states(record: dict[str, Any]) -> dict[str, str]:
    return {cell["condition"]: cell["state"] for cell in record["cells"]}


def changed(out: Path, before: dict[Path, int]) -> set[str]:
    """Folders of runs that were written since."""
    return {
        path.parent.relative_to(out / "cells").as_posix().split("/", 1)[1]
        for path in (out / "cells").glob("*/*/*/run.json")
        if path.stat().st_mtime_ns != before.get(path)
    }


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*/*/*/run.json")}


# --- the grid -----------------------------------------------------------------------------------


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], compare.Grid]:
    """The grid that a command line stands for, with nothing trained."""

    def get(words: str) -> compare.Grid:
        kept = []

        def run(spec: compare.Spec, out: Path, build: compare.Build, **_: Any) -> dict[str, Any]:
            kept.append(compare.grid(spec, build))
            return {"status": "finished"}

        with monkeypatch.context() as patch:
            patch.setattr(compare, "run", run)
            patch.setattr(compare, "text", lambda record: "")
            args = _parser().parse_args(["compare", *shlex.split(words), "--out", "never"])
            args.run(args, f"batchproof compare {words} --out never")
        return kept[0]

    return get


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


def test_a_norm_can_sit_in_one_network_alone(grid: Callable[[str], compare.Grid]) -> None:
    found = grid(f"--algo crossq:wn --env {ENV} --norm default,critic:layer --placement post")
    by_name = {condition.name: condition for condition in found.conditions}
    assert list(by_name) == ["crossq:wn-post", "crossq:wn-critic:layer-post"]
    args = _parser().parse_args(
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
        args = _parser().parse_args(["train", *words, "--out", "never"])
        from batchproof import cli

        return cli._training(args, {})

    spec = compare.Spec(
        algos=("crossq", "td3"),
        envs=(ENV, "Pendulum-v1"),
        norms=("batch", "none"),
        shared=(("--hidden", "8,8"),),
        seeds=(0, 1, 2),
        at_once=2,
    )
    conditions = compare.grid(spec, build).conditions
    kept = compare.ordered(compare.cells(spec, conditions, tmp_path, build))
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
    monkeypatch.setattr(compare, "listing", lambda spec, build: specs.append(spec) or "")
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


def test_the_example_of_the_docs_is_what_its_page_shows(
    grid: Callable[[str], compare.Grid],
) -> None:
    docs = Path(__file__).parents[1] / "docs"
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


# --- running ------------------------------------------------------------------------------------


def test_the_record_holds_what_the_runs_gave(whole: tuple[Path, dict[str, Any]]) -> None:
    out, record = whole
    assert record["status"] == "finished"
    assert states(record) == {"ddpg-none": "finished", "ddpg-critic:batch": "finished"}
    for cell in record["cells"]:
        (population,) = cell["populations"]
        folder = out / population["folder"]
        metrics = loop.read_metrics(folder / "metrics.parquet")
        last = metrics["step"] == STEPS
        # Paired: every condition has the same seeds.
        assert metrics["seed"][last].tolist() == [0, 1]
        assert [*cell["final_returns"].values()] == metrics["return"][last].tolist()
        curves = metrics["return"].reshape(-1, 2)
        area = (curves[0] + 2 * curves[1] + curves[2]) / 4
        np.testing.assert_allclose([*cell["return_over_training"].values()], area)
        assert population["steps_per_s"] > 0
        # The run's own command is one that train takes, and it finds this very run finished.
        command = json.loads((folder / "run.json").read_text())["command"]
        _parser().parse_args(shlex.split(command)[1:])
    table = record["statistics"][0]
    assert [row["condition"] for row in table["rows"]] == ["ddpg-none", "ddpg-critic:batch"]
    assert table["ranking"] is None
    (comparison,) = table["comparisons"]
    assert (comparison["a"], comparison["b"]) == ("ddpg-critic:batch", "ddpg-none")
    assert comparison["verdict"] == "too few seeds"
    assert comparison["sentence"] in record["sentences"]
    assert any(line.startswith("No ranking") for line in record["sentences"])
    shown = compare.text(record)
    assert "ddpg-critic:batch" in shown
    assert comparison["sentence"] in shown


def test_a_populations_command_finds_it_finished(
    whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, record = whole
    folder = out / record["cells"][1]["populations"][0]["folder"]
    command = json.loads((folder / "run.json").read_text())["command"]
    assert main([*shlex.split(command)[1:], "--no-progress"]) == 0
    assert "This run was finished before" in capsys.readouterr().out


def test_what_is_finished_is_kept_and_conditions_and_seeds_can_be_added(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    before = times(out)
    again = run(f"{SMALL} --seeds 2", out)
    assert changed(out, before) == set()
    assert returns(again) == returns(whole[1])
    speeds = [[p["steps_per_s"] for p in cell["populations"]] for cell in again["cells"]]
    assert speeds == [[p["steps_per_s"] for p in c["populations"]] for c in whole[1]["cells"]]

    more = run(f"{SMALL} --seeds 4", out)
    assert changed(out, before) == {"ddpg-none/seeds-2-3", "ddpg-critic-batch/seeds-2-3"}
    for name, held in returns(more).items():
        assert list(held) == ["0", "1", "2", "3"]
        assert held.items() >= returns(whole[1])[name].items()
    assert more["statistics"][0]["comparisons"][0]["seeds"] == 4

    shutil.rmtree(out / "cells/batchproof-ConstantReward-v0/ddpg-critic-batch")
    before = times(out)
    added = run(f"{SMALL} --seeds 2", out)
    assert changed(out, before) == {"ddpg-critic-batch/seeds-0-1"}
    assert returns(added) == returns(whole[1])


def test_other_settings_need_another_folder(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    words = f"{SMALL} --seeds 2 --buffer-size 50 --env {ENV} --out {out}"
    assert main(["compare", *shlex.split(words)]) == 2
    assert "they differ in buffer_size" in capsys.readouterr().err


def test_a_budget_stops_in_time_and_the_same_command_continues_exactly(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No time at all, and one population begun: it stops at its first evaluation.
    with pytest.MonkeyPatch.context() as patch:
        start = compare._Clock.__init__
        patch.setattr(compare._Clock, "__init__", lambda clock, _: start(clock, 0.0))
        patch.setattr(compare._Clock, "has_time", lambda clock: True)
        record = run(f"{SMALL} --seeds 2 --budget 1s", tmp_path)
    assert record["status"] == "stopped"
    assert states(record) == {
        "ddpg-none": f"stopped at {EVERY} of {STEPS}",
        "ddpg-critic:batch": "waiting",
    }
    assert "Stopped by --budget: 0 of 2 cells are finished" in capsys.readouterr().out
    assert record["statistics"][0]["rows"] == []
    one = record["cells"][0]["populations"][0]
    assert one["last_return"] is not None
    after = run(f"{SMALL} --seeds 2", tmp_path)
    assert returns(after) == returns(whole[1])
    two = after["cells"][0]["populations"][0]
    assert two["wall_s"] > one["wall_s"]
    for condition in ("ddpg-none", "ddpg-critic-batch"):
        path = f"cells/batchproof-ConstantReward-v0/{condition}/seeds-0-1/metrics.parquet"
        once, twice = (loop.read_metrics(out / path) for out in (whole[0], tmp_path))
        for name in once:
            np.testing.assert_array_equal(once[name], twice[name], err_msg=name)


def test_the_clock_stops_before_an_evaluation_that_would_come_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(compare.time, "monotonic", lambda: now[0])
    clock = compare._Clock(deadline=130.0)
    assert clock.has_time()
    clock.start()
    for moment, over in ((112.0, False), (117.0, False), (122.0, False), (127.0, True)):
        now[0] = moment
        assert clock.is_over() == over  # 127 + 5 is past 130
    # The quickest start took 12 seconds: with 3 left, no other is begun.
    assert not clock.has_time()
    now[0] = 117.0
    assert clock.has_time()
    assert not compare._Clock(None).is_over()


def test_interrupts_leave_a_state_that_resumes(
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A test run in the background of a shell may have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    advance = off_policy.Stepper.advance

    def interrupted(count: int) -> Callable[..., None]:
        def pressing(stepper: off_policy.Stepper, last: int, *rest: Any) -> None:
            for _ in range(count):
                signal.raise_signal(signal.SIGINT)
            advance(stepper, last, *rest)

        return pressing

    # One Ctrl-C ends with the evaluation at the end of the interval, two end within it.
    for count in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(off_policy.Stepper, "advance", interrupted(count))
            record = run(f"{SMALL} --seeds 2", tmp_path, code=130)
        assert record["status"] == "interrupted"
        assert states(record) == {
            "ddpg-none": f"stopped at {EVERY} of {STEPS}",
            "ddpg-critic:batch": "waiting",
        }
        assert "Interrupted: 0 of 2 cells are finished; the same command continues." in (
            capsys.readouterr().out
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    assert returns(run(f"{SMALL} --seeds 2", tmp_path)) == returns(whole[1])


def test_a_cell_that_fails_is_marked_and_the_others_go_on(
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = loop.train

    def failing(training: Any, out: Path, **options: Any) -> loop.Result:
        if training.config.critic.norm.kind == "layer":
            out.mkdir(parents=True)
            raise RuntimeError("out of\nmemory")
        return train(training, out, **options)

    out = shutil.copytree(whole[0], tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", failing)
        words = SMALL.replace("none,", "none,critic:layer,") + " --seeds 2"
        record = run(words, out, env=f"{ENV},Nope-v0")
    failed = {
        (cell["environment"], cell["condition"]): cell["populations"][0]["error"]
        for cell in record["cells"]
        if cell["state"] == "failed"
    }
    assert len(failed) == 4
    assert failed[ENV, "ddpg-critic:layer"] == "RuntimeError: out of memory"
    assert "unknown environment" in failed["Nope-v0", "ddpg-none"]
    held = returns(record)
    assert held.pop("ddpg-critic:layer") == {}
    assert held == returns(whole[1])
    shown = capsys.readouterr().out
    assert "failed: batchproof/ConstantReward-v0 ddpg-critic:layer: RuntimeError" in shown
    assert "2 of 6 cells are finished; the same command tries those that failed again." in shown
    trace = out / "cells/batchproof-ConstantReward-v0/ddpg-critic-layer/seeds-0-1/error.txt"
    assert "Traceback" in trace.read_text()


def test_listing_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", *shlex.split(SMALL), "--env", ENV, "--out", str(out), "--list"]) == 0
    shown = capsys.readouterr().out
    assert "ddpg-critic:batch" in shown
    assert "2 conditions on batchproof/ConstantReward-v0: 2 cells of 5 seeds" in shown
    assert not out.exists()


# --- results ------------------------------------------------------------------------------------


def cell(env: str, name: str, finals: list[float]) -> compare.Cell:
    """A finished cell with seeds 0, 1, ... and two evaluations, at 0 and its final return."""
    count = len(finals)
    columns = {
        "seed": np.tile(np.arange(count), 2),
        "step": np.repeat([10, 20], count),
        "return": np.array([0.0] * count + finals),
    }
    training = SimpleTraining(tuple(range(count)))
    population = compare.Population(training, Path("out/cells/x"), "finished")  # type: ignore[arg-type]
    seeds = [{"seed": i, "final_return": value} for i, value in enumerate(finals)]
    population.result = loop.Result(columns, seeds, 1.0)
    return compare.Cell(env, condition(name), [population])


class SimpleTraining:
    def __init__(self, seeds: tuple[int, ...]) -> None:
        self.seeds, self.steps = seeds, 20


def condition(name: str) -> compare.Condition:
    return compare.Condition(name, name.split("-")[0], name, (), name.endswith("none"), 1.0)


def test_each_condition_is_compared_with_its_own_algorithm_unnormalized() -> None:
    held = [condition(n) for n in ("sac-batch", "sac-none", "td3-batch", "td3-none", "wn-default")]
    assert compare._pairs(held, None) == [
        ("sac-batch", "sac-none"),
        ("td3-batch", "td3-none"),
        ("td3-none", "sac-none"),
        ("wn-default", "sac-none"),
    ]
    assert compare._pairs(held, "td3-batch") == [
        (c.name, "td3-batch") for c in held if c.name != "td3-batch"
    ]


def test_statistics_are_those_of_the_study_module_with_one_correction_for_all() -> None:
    rng = np.random.default_rng(0)
    finals = {
        (env, name): (rng.normal(size=6) + shift).tolist()
        for env in ("A", "B")
        for name, shift in (("td3-none", 0.0), ("td3-batch", 5.0), ("td3-layer", 0.1))
    }
    found = [cell(env, name, values) for (env, name), values in finals.items()]
    conditions = [condition(name) for name in ("td3-none", "td3-batch", "td3-layer")]
    spec = compare.Spec(("td3",), ("A", "B"), seeds=tuple(range(6)))
    tables, lines = compare._statistics(spec, conditions, found)
    raw = []
    for table in tables:
        env = table["environment"]
        for row in table["rows"]:
            values = finals[env, row["condition"]]
            assert row["mean"]["value"] == pytest.approx(np.mean(values))
            assert row["iqm"]["value"] == pytest.approx(statistics.iqm(values))
            assert row["n"] == 6
        assert table["ranking"][0]["condition"] == "td3-batch"
        for made in table["comparisons"]:
            p = statistics.paired_test(finals[env, made["a"]], finals[env, made["b"]])
            assert made["p"] == pytest.approx(p)
            raw.append(made)
    # Four comparisons were made, so all four are corrected together.
    corrected = statistics.holm([made["p"] for made in raw])
    np.testing.assert_allclose([made["p_holm"] for made in raw], corrected)
    assert raw[0]["verdict"] == "higher"
    assert sum("Over all 2 environments a run of td3-batch beats one of td3-none in 100%" in line
               for line in lines) == 1  # fmt: skip


def test_a_seed_that_diverged_counts_as_the_lowest_return(tmp_path: Path) -> None:
    found = [
        cell("A", "td3-none", [1.0, 2.0, 3.0, 4.0, -7.0]),
        cell("A", "td3-wild", [5.0, math.nan, math.nan, 5.0, 5.0]),
    ]
    spec = compare.Spec(("td3",), ("A",), seeds=tuple(range(5)))
    (table,), lines = compare._statistics(spec, [one.condition for one in found], found)
    assert table["floor"] == -7.0
    row = table["rows"][1]
    assert row["mean"]["value"] == pytest.approx((5 - 7 - 7 + 5 + 5) / 5)
    assert (row["diverged"], row["min"], row["max"]) == (2, -7.0, 5.0)
    assert lines[0].startswith("Seeds diverged (td3-wild: 2); each counts as the lowest return")
    record = compare._cell_record(found[1], spec.seeds, Path("out"))
    assert record["diverged"] == [1, 2]
    assert math.isnan(record["final_returns"]["1"])


def test_seeds_are_paired_by_their_number() -> None:
    low = cell("A", "td3-none", [0.0, 10.0, 20.0, 30.0, 40.0, 50.0])
    high = cell("A", "td3-batch", [1.1, 11.0, 21.2, 31.0, 41.1, 51.0])
    population = high.populations[0]
    assert population.result is not None
    turned = {name: values[::-1] for name, values in population.result.metrics.items()}
    order = turned["step"].argsort(kind="stable")
    population.result = population.result._replace(
        metrics={name: values[order] for name, values in turned.items()}
    )
    spec = compare.Spec(("td3",), ("A",), seeds=tuple(range(6)))
    tables, _ = compare._statistics(spec, [low.condition, high.condition], [low, high])
    (made,) = tables[0]["comparisons"]
    # Unpaired, a difference of 1 is nothing beside a spread of 50.
    assert made["difference"]["value"] == pytest.approx(np.mean([1.1, 1, 1.2, 1, 1.1, 1]))
    assert made["verdict"] == "higher"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_on_a_terminal_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "8")
    found = [cell("A", f"td3-{i}", [1.0, 3.0]) for i in range(20)]
    for one in found:
        one.populations[0].last = 2.0
    running = found[11].populations[0]
    running.state, running.step, running.last = "running", 5, math.nan
    queue = compare.ordered(found)
    screen = Terminal()
    show = compare._Show(found, queue, compare.Spec((), ("A",)), 0.0, True, screen)
    show.say("a note")
    show.draw(now=True)
    first = screen.getvalue()
    assert first.startswith("a note\n")
    shown = first.splitlines()[1:]
    assert len(shown) <= 8
    assert max(map(len, shown)) < 80
    assert any("td3-11" in line and "running at 5 of 20" in line for line in shown)
    assert "19 of 20 finished" in shown[-1]
    show.draw(now=True)
    second = screen.getvalue()[len(first) :]
    assert second.startswith(f"\x1b[{len(shown)}A\x1b[J")
    show.close()
    assert screen.getvalue().endswith("\x1b[J")


def test_without_a_terminal_there_are_lines() -> None:
    found = [cell("A", "td3-none", [1.0, 3.0])]
    stream = io.StringIO()
    show = compare._Show(found, compare.ordered(found), compare.Spec((), ("A",)), 0.0, True, stream)
    population = found[0].populations[0]
    show.start(found[0], population)
    show.draw(now=True)
    population.last = 2.0
    show.end(found[0], population)
    show.close()
    assert stream.getvalue() == (
        "[1/1] A td3-none: running\n[1/1] A td3-none: finished, return 2\n"
    )


def test_populations_of_one_cell_have_different_folders() -> None:
    lists = [(0,), (0, 1), (1, 2), (0, 2), tuple(range(0, 100, 2)), tuple(range(1, 100, 2))]
    folders = [compare._seeds_name(seeds) for seeds in lists]
    assert folders[:4] == ["seed-0", "seeds-0-1", "seeds-1-2", "seeds-0_2"]
    assert all(a != b for a, b in itertools.combinations(folders, 2))
    assert max(map(len, folders)) < 60


# --- environments -------------------------------------------------------------------------------


class Parts(gymnasium.Env):
    """Observations in parts, as the DeepMind Control Suite gives them."""

    observation_space = spaces.Dict(
        {
            "velocity": spaces.Box(-np.inf, np.inf, (2,)),
            "body": spaces.Dict({"height": spaces.Box(-np.inf, np.inf, ())}),
        }
    )
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        parts = {"velocity": np.float32([2, 3]), "body": {"height": np.float32(1)}}
        return parts, {}


def test_observations_in_parts_come_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium, "make", lambda env_id, **options: Parts())
    env = host.make("Parts-v0", {})
    assert env.observation_space.shape == (3,)
    assert env.reset()[0].tolist() == [1, 2, 3]

    labelled = spaces.Dict({"label": spaces.Discrete(3)})
    monkeypatch.setattr(Parts, "observation_space", labelled)
    with pytest.raises(BatchproofError, match="has a Dict observation space, but the lab needs"):
        host.make("Parts-v0", {})


def test_the_control_suite_names_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BatchproofError, match=r"pip install 'batchproof\[dmc\]'"):
        host.make("dm_control/pendulum-swingup-v0", {})


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("dm_control", "shimmy"))), reason="needs dm-control"
)
def test_an_episode_of_the_control_suite_continues_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")
    envs = host.HostEnvs("dm_control/cheetah-run-v0", [{}, {}], [0, 7], host.TRAIN)
    envs.reset()
    rng = np.random.default_rng(0)
    for _ in range(1040):  # past an episode's end, at 1000
        result = envs.step(rng.uniform(-1, 1, (2, envs.action_size)).astype(np.float32))
    again = host.HostEnvs("dm_control/cheetah-run-v0", [{}, {}], [0, 7], host.TRAIN)
    np.testing.assert_array_equal(again.restore(envs.state()), result.obs)
