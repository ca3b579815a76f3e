"""The command line: quick where nothing runs, one line where something is wrong."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest

import batchproof.study
from batchproof.cli import main, parser

ENV = "batchproof/ConstantReward-v0"
TINY = shlex.split(
    f"train td3 --env {ENV} --hidden 16,16 --steps 200 --learning-starts 50 --batch-size 16 "
    "--eval-every 100 --no-progress"
)
HEAVY = ("jax", "torch", "matplotlib", "gymnasium", "numpy", "pyarrow", "tqdm")

TRAIN = ["train", "td3", "--env", ENV, "--out", "never"]
MISTAKES = {
    "no command": ([], "COMMAND"),
    "unknown command": (["trane"], "trane"),
    "no env": (["train", "td3", "--out", "never"], "--env"),
    "no out": (["train", "td3", "--env", ENV], "--out"),
    "unknown algorithm": (["train", "ppo", *TRAIN[2:]], "use one of td3, sac, ddpg"),
    "unknown option": ([*TRAIN, "--nrom", "batch"], "--nrom"),
    "cut-off option": ([*TRAIN, "--learning", "1e-3"], "--learning"),
    "unknown norm": ([*TRAIN, "--norm", "bach"], "unknown norm 'bach': use one of none, batch"),
    "unknown precision": ([*TRAIN, "--critic-precision", "half"], "use one of float32, bfloat16"),
    "unknown placement": ([*TRAIN, "--norm", "batch", "--placement", "input+mid"], "'mid'"),
    "unknown mode": ([*TRAIN, "--norm", "batch", "--modes", "TEXTE"], "unknown mode plan 'TEXTE'"),
    "half a joint pass": ([*TRAIN, "--norm", "batch", "--modes", "TEEJE"], "impossible mode plan"),
    "misplaced mixture": ([*TRAIN, "--norm", "batch", "--modes", "TEETM"], "impossible mode plan"),
    "momentum 1.5": ([*TRAIN, "--norm", "batch", "--momentum", "1.5"], "--momentum"),
    "momentum 0": ([*TRAIN, "--norm", "batch", "--momentum", "0"], "--momentum"),
    "negative eps": ([*TRAIN, "--norm", "batch", "--eps=-1"], "--eps"),
    "NaN learning rate": ([*TRAIN, "--learning-rate", "nan"], "--learning-rate"),
    "infinite learning rate": ([*TRAIN, "--learning-rate", "inf"], "--learning-rate"),
    "gamma 1.1": ([*TRAIN, "--gamma", "1.1"], "--gamma"),
    "tau 0": ([*TRAIN, "--tau", "0"], "--tau"),
    "steps 0": ([*TRAIN, "--steps", "0"], "--steps: must be at least 1"),
    "steps 1e3": ([*TRAIN, "--steps", "1e3"], "'1e3' is not a whole number"),
    "seed twice": ([*TRAIN, "--seeds", "0,0"], "distinct"),
    "no seeds": ([*TRAIN, "--seeds", "0"], "--seeds"),
    "negative seed": ([*TRAIN, "--seeds", "3,-1"], "--seeds"),
    "a seed for a count": ([*TRAIN, "--seeds", "123456789"], "'123456789,'"),
    "too large a seed": ([*TRAIN, "--seeds", "4294967296,"], "2**32"),
    "hidden abc": ([*TRAIN, "--hidden", "abc"], "'abc' is not a list of positive widths"),
    "hidden 16,0": ([*TRAIN, "--hidden", "16,0"], "'16,0'"),
    "empty out": ([*TRAIN[:-1], ""], "must name a folder, got nothing"),
    "option without value": ([*TRAIN, "--env-option", "ending"], "KEY=VALUE"),
    "option twice": ([*TRAIN, *["--env-option", "g=1"] * 2], "g is given twice"),
    "momentum without a norm": (
        [*TRAIN, "--momentum", "0.1"],
        "--momentum has no effect without a norm",
    ),
    "momentum of a layer norm": (
        [*TRAIN, "--norm", "layer", "--momentum", "0.1"],
        "--momentum has no effect without a norm that keeps running statistics",
    ),
    "eps without a norm": ([*TRAIN, "--eps", "1e-3"], "--eps has no effect"),
    "groups of a batch norm": (
        [*TRAIN, "--norm", "batch", "--groups", "4"],
        "--groups has no effect without --norm group",
    ),
    "modes without a norm": ([*TRAIN, "--modes", "TEETE"], "--modes has no effect without a norm"),
    "modes of an rms norm": ([*TRAIN, "--norm", "rms", "--modes", "TEETE"], "--modes has no effe"),
    "placement without a norm": ([*TRAIN, "--placement", "post"], "--placement has no effect"),
    "placement in the other network": (
        [*TRAIN, "--critic-norm", "batch", "--actor-placement", "post"],
        "--actor-placement has no effect",
    ),
    "target statistics without targets": (
        [*TRAIN, "--norm", "batch", "--target-stats", "copy", "--no-target-network"],
        "--target-stats has no effect with --no-target-network",
    ),
    "tau without targets": (
        [*TRAIN, "--tau", "0.01", "--no-target-network"],
        "--tau has no effect with --no-target-network",
    ),
    "target statistics without any": ([*TRAIN, "--target-stats", "stale"], "--target-stats has no"),
    "unknown target statistics": ([*TRAIN, "--target-stats", "old"], "copy, polyak, stale"),
    "unknown preset": (["train", "ddpg", *TRAIN[2:], "--preset", "papr"], "ddpg has paper"),
    "preset where there is none": ([*TRAIN, "--preset", "paper"], "td3 has none"),
    "unknown estimator": (
        [*TRAIN, "--norm", "batch", "--estimator", "mean"],
        "unknown estimator 'mean': use one of ema",
    ),
    "estimator without a norm": ([*TRAIN, "--estimator", "huber"], "--estimator has no effect"),
    "setting without value": ([*TRAIN, "--set", "tau"], "KEY=VALUE"),
    "update every 0": ([*TRAIN, "--update-every", "0"], "--update-every"),
    "report of nothing": (["report"], "RUN"),
    "report of no folder": (["report", "nowhere"], "nowhere: no such folder"),
    "report to a NaN": (["report", "x", "--threshold", "nan"], "--threshold"),
    "study of no seeds": (["study", "x", "--seeds", "0"], "--seeds"),
    "unknown ending": (["study", "x", "--ending", "never"], "'never'"),
}


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command which cannot run leaves on standard error."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("batchproof: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(("words", "part"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    words: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in complaint(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_help_and_mistakes_import_nothing_heavy(tmp_path: Path) -> None:
    script = """
import json, sys
from batchproof.cli import main
found = {}
for name, words in json.load(sys.stdin).items():
    code = main(words)
    loaded = sorted(set(sys.argv[1:]) & set(sys.modules))
    found[name] = [code, loaded]
json.dump(found, sys.stderr)
"""
    commands = {name: words for name, (words, _) in MISTAKES.items()}
    commands |= {
        "help": ["--help"],
        "train help": ["train", "--help"],
        "study help": ["study", "--help"],
        "version": ["--version"],
        "modes": ["modes"],
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *HEAVY],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = json.loads(done.stderr.splitlines()[-1])
    assert found == {name: [2 if name in MISTAKES else 0, []] for name in commands}


COMMANDS = {
    "train": (["td3", "--env", ENV], "--out"),
    "compare": ([], "--out"),
    "study": ([], "--out"),
    "report": (["run"], "--out"),
    "audit": (["model.zip"], "--output"),
    "trace": (["model.zip"], "--output"),
    "fix": (["model.zip"], "-o"),
    "export": (["run", "--format", "torch"], "-o"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_is_named_alike_in_every_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rest, documented = COMMANDS[command]
    for spelling in ("-o", "--output", "--out"):
        args = parser().parse_args([command, *rest, spelling, "there"])
        assert Path("there") in vars(args).values()
    assert main([command, "--help"]) == 0
    usage, _, options = capsys.readouterr().out.partition("options:")
    assert f"{documented} " in usage
    assert options.split(f"  {documented} ")[1].lstrip().startswith(("DIR, -", "FILE, -", "OUT, -"))


def test_a_comparison_of_one_is_told_in_the_singular(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--algo", "td3", "--env", ENV, "--seeds", "3,", "--list"]
    for spelling in ("-o", "--output", "--out"):
        assert main([*words, spelling, str(tmp_path / "out")]) == 0
        assert f"1 condition on {ENV}: 1 cell of 1 seed" in capsys.readouterr().out.splitlines()
    (tmp_path / "one.toml").write_text(f'algo = "td3"\nenv = "{ENV}"\nout = "x"\nseeds = [3]\n')
    assert main(["compare", str(tmp_path / "one.toml"), "--list"]) == 0
    assert "1 cell of 1 seed" in capsys.readouterr().out


def test_a_report_never_takes_the_place_of_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    for out, part in (
        ("run/run.json", "a run's own record"),
        ("run/metrics.parquet", "a run's own record"),
        ("compare.json", "a run's own record"),
        ("run/checkpoint/page.html", "a run's own record"),
        ("run", "run is a folder: name a file"),
    ):
        assert part in complaint(capsys, "report", "run", "--out", out)
    assert (tmp_path / "run/run.json").read_text() == "{}"


def test_code_that_ends_python_ends_no_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("batchproof.cli.modes.run", lambda args, command: sys.exit(0))
    assert "ended Python (sys.exit(0))" in complaint(capsys, "modes")


def test_the_names_repeated_for_speed_are_the_library_s() -> None:
    from batchproof.cli import words as repeated
    from batchproof.lab import nets, norms, passes
    from batchproof.lab.agents import AGENTS

    running = [k for k in norms.KINDS if norms.init(norms.Norm(k, groups=1), 2)[1]]
    assert tuple(AGENTS) == repeated.ALGORITHMS
    assert {name: tuple(agent.PRESETS) for name, agent in AGENTS.items()} == repeated.AGENT_PRESETS
    for name, agent in AGENTS.items():
        kinds = {agent.Config().actor.norm.kind}
        kinds |= {agent.Config().critic.norm.kind} if hasattr(agent.Config(), "critic") else set()
        assert kinds == {repeated.NORMALIZED.get(name, "none")}
    assert tuple(norms.ESTIMATORS) == repeated.ESTIMATORS
    assert tuple(norms.KINDS) == repeated.NORMS
    assert tuple(running) == repeated.RUNNING_NORMS
    assert norms.PLACEMENTS == repeated.PLACEMENTS
    assert nets.PRECISIONS == repeated.PRECISIONS
    assert passes.TARGET_STATS == repeated.TARGET_STATS


def test_a_study_takes_the_options_that_its_row_names() -> None:
    from batchproof.cli.study import STUDY_OPTIONS

    named = {option for row in batchproof.study.STUDIES.values() for option in row.options}
    assert named == set(STUDY_OPTIONS)
    for row in batchproof.study.STUDIES.values():
        if row.options:
            assert {*row.options} <= signature(import_module(row.module).run).parameters.keys()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--env", "batchproof/ConstantRewards-v0"], f"did you mean {ENV}"),
        (["--env", "CartPole-v1"], "continuous actions"),
        (["--env", "Pendulum-v1", "--env-option", "gravity=1"], "gravity"),
        (["--env-option", "ending=never"], "unknown ending 'never'"),
        (["--env-option", "ending=never", "--host-env"], "unknown ending 'never'"),
        (["--env-option", "beginning=now"], "beginning"),
        (["--set", "taau=1"], "--set taau: td3 has no such setting: did you mean tau?"),
        (["--set", "policy_delay=2.5"], "--set policy_delay=2.5: expected a value such as 2"),
        (["--set", "target_network=1"], "--set target_network=1: expected a value such as true"),
        (["--set", "tau=5"], "tau must be in (0, 1]"),
        (["--hidden", "16", "--norm", "batch", "--placement", "before-action"], "two hidden"),
        (["--norm", "group", "--groups", "3"], "3 equal groups"),
        (["--learning-starts", "200"], "learning_starts"),
    ],
)
def test_what_only_the_library_can_judge_is_one_line_too(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of an option given twice, the last counts.
    assert part in complaint(capsys, *TINY, "--out", str(tmp_path / "run"), *words)


def test_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "file" in complaint(capsys, *TINY, "--out", str(tmp_path / "file"))
    assert "below" in complaint(capsys, *TINY, "--out", str(tmp_path / "file" / "below"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "permission denied" in complaint(capsys, *TINY, "--out", str(tmp_path / "closed"))


@pytest.fixture
def interrupted_by(monkeypatch: pytest.MonkeyPatch):
    """Make the training raise."""

    def patch(error: BaseException) -> None:
        def train(*args: object, **kwargs: object) -> None:
            raise error

        from batchproof.lab import loop

        monkeypatch.setattr(loop, "train", train)

    return patch


def test_a_full_disk_is_one_line(
    interrupted_by, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_by(OSError(errno.ENOSPC, "No space left on device", "metrics.parquet"))
    line = complaint(capsys, *TINY, "--out", str(tmp_path / "run"))
    assert line == "batchproof: error: metrics.parquet: No space left on device\n"


def test_a_missing_package_is_one_line(
    interrupted_by, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_by(ModuleNotFoundError("No module named 'optax'", name="optax"))
    assert "pip install" in complaint(capsys, *TINY, "--out", str(tmp_path / "run"))


def test_an_interrupt_says_how_to_go_on(
    interrupted_by, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_by(KeyboardInterrupt())
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 130
    err = capsys.readouterr().err
    assert err == "batchproof: interrupted: the same command resumes\n"


def test_a_reader_that_leaves_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "batchproof", "modes"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""


def test_modes_shows_every_slot_letter_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    from batchproof.modes import PRESETS, Mode, Slot

    assert main(["modes"]) == 0
    shown = capsys.readouterr().out
    for text in (*PRESETS, *PRESETS.values(), *(slot.title for slot in Slot)):
        assert text in shown
    for letter in {letter for plan in PRESETS.values() for letter in plan} | set("SMB"):
        assert f"{letter}  {Mode(letter).title}" in shown


def test_words_become_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchproof.lab import loop
    from batchproof.lab.agents import sac
    from batchproof.lab.nets import MLP
    from batchproof.lab.norms import Norm
    from batchproof.lab.training import Training
    from batchproof.modes import Plan

    called = {}

    def train(training: Training, out: Path, **options: object) -> loop.Result:
        called.update(options, training=training, out=out)
        return loop.Result({}, [], 0.0)

    monkeypatch.setattr(loop, "train", train)
    words = shlex.split(
        "train sac --env Pendulum-v1 --norm batch --critic-norm renorm --placement input+post "
        "--critic-placement before-action --momentum 0.01 --eps 1e-3 --modes crossq "
        "--target-stats stale --hidden 8,8 --critic-hidden 4,4,4 --learning-rate 1e-3 --gamma 0.9 "
        "--tau 0.5 --batch-size 7 --gradient-steps 2 --learning-starts 5 --buffer-size 50 "
        "--steps 60 --seeds 0,3,7 --eval-every 6 --eval-episodes 2 --env-option g=9.81 "
        "--env-option render_mode=rgb_array --host-env --tensorboard --out"
    )
    assert main([*words, str(tmp_path)]) == 0
    layer = {"momentum": 0.01, "eps": 1e-3}
    assert called == {
        "training": Training(
            algo="sac",
            config=sac.Config(
                actor=MLP((8, 8), Norm("batch", "input+post", **layer)),
                critic=MLP((4, 4, 4), Norm("renorm", "before-action", **layer)),
                plan=Plan.parse("TEEJJ"),
                learning_rate=1e-3,
                gamma=0.9,
                tau=0.5,
                batch_size=7,
                target_stats="stale",
            ),
            env_id="Pendulum-v1",
            env_options={"g": 9.81, "render_mode": "rgb_array"},
            seeds=(0, 3, 7),
            steps=60,
            learning_starts=5,
            buffer_size=50,
            gradient_steps=2,
            eval_every=6,
            eval_episodes=2,
            host_env=True,
        ),
        "out": tmp_path,
        "progress": True,
        "label": "sac Pendulum-v1",
        "tensorboard": True,
        "command": " ".join(["batchproof", *words, str(tmp_path)]),
    }


def test_a_preset_and_settings_become_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from batchproof.lab import loop
    from batchproof.lab.agents import ddpg
    from batchproof.lab.training import Training

    seen = []

    def train(training: Training, out: Path, **options: object) -> loop.Result:
        seen.append(training)
        return loop.Result({}, [], 0.0)

    monkeypatch.setattr(loop, "train", train)
    words = ["train", "ddpg", "--env", ENV, "--preset", "paper", "--set", "ou_theta=0.3"]
    words += ["--critic-norm", "none", "--tau", "0.5", "--update-every", "3", "--out"]
    assert main([*words, str(tmp_path)]) == 0
    paper = ddpg.PRESETS["paper"]
    critic = replace(paper.critic, norm=replace(paper.critic.norm, kind="none"))
    assert seen[0].config == replace(paper, ou_theta=0.3, tau=0.5, critic=critic)
    assert seen[0].update_every == 3


TINY_TEAM = shlex.split(
    "train maddpg --env batchproof/Rally-v0 --hidden 16,16 --steps 200 --learning-starts 50 "
    "--batch-size 16 --eval-every 200 --eval-episodes 1 --no-progress"
)


@pytest.mark.parametrize(("words", "agent"), [(TINY, ""), (TINY_TEAM, " --agent left")])
def test_what_train_names_as_next_steps_works(
    words: list[str],
    agent: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--seeds", "3,", "--out", "a run"]) == 0
    shown = capsys.readouterr().out
    steps = [
        line.split(": batchproof ")[1] for line in shown.splitlines() if ": batchproof " in line
    ]
    assert steps == ["report 'a run'", f"audit 'a run' --seed 3{agent}"]
    for step in steps:
        assert main(shlex.split(step)) in (0, 1), step
    assert (tmp_path / "report.html").is_file()


def test_an_option_that_the_agent_has_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "reinforce", "--env", ENV, "--out", str(tmp_path / "run")]
    assert "--tau has no effect in reinforce" in complaint(capsys, *words, "--tau", "0.1")
    line = complaint(capsys, *words, "--critic-hidden", "8")
    assert "--critic-hidden has no effect: reinforce has no critic" in line
    line = complaint(capsys, *words, "--critic-precision", "bfloat16")
    assert "--critic-precision has no effect: reinforce has no critic" in line
    assert not (tmp_path / "run").exists()


def test_without_options_the_library_s_defaults_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchproof.lab import loop
    from batchproof.lab.agents import td3
    from batchproof.lab.training import Training

    seen = []

    def train(training: Training, out: Path, **options: object) -> loop.Result:
        seen.append(training)
        return loop.Result({}, [], 0.0)

    monkeypatch.setattr(loop, "train", train)
    assert main(["train", "td3", "--env", ENV, "--seeds", "7,", "--out", str(tmp_path)]) == 0
    assert main(["train", "td3", "--env", ENV, "--seeds", "3", "--out", str(tmp_path)]) == 0
    assert seen[0].config == td3.Config()
    assert seen[0].steps == 100_000
    assert [training.seeds for training in seen] == [(7,), (0, 1, 2)]


def test_seeds_that_diverged_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchproof.lab import loop

    seeds = [
        {"seed": 0, "status": "ok", "diverged_at": None, "final_return": 20.0},
        {"seed": 1, "status": "diverged", "diverged_at": 123, "final_return": float("nan")},
        {"seed": 2, "status": "ok", "diverged_at": None, "final_return": 10.0},
        {"seed": 3, "status": "diverged", "diverged_at": 9, "final_return": None},
    ]
    monkeypatch.setattr(loop, "train", lambda *_, **__: loop.Result({}, seeds, 1.0))
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "diverged at step 123" in shown
    assert "DIVERGED: 2 of 4 seeds" in shown
    assert "mean 15.00, min 10.00, max 20.00 over 2 seeds that did not diverge" in shown


def test_a_real_run_and_its_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--seeds", "2", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    first, err = capsys.readouterr()
    assert err == ""
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["command"] == " ".join(["batchproof", *words])
    assert [seed["seed"] for seed in run["seeds"]] == [0, 1]
    assert (tmp_path / "run" / "metrics.parquet").is_file()
    assert (tmp_path / "run" / "checkpoint" / "state.json").is_file()
    for seed in run["seeds"]:
        assert f"{seed['final_return']:.2f}  ok" in first
    assert "mean" in first
    assert str(tmp_path / "run" / "metrics.parquet") in first

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.*")}
    assert main(words) == 0
    second = capsys.readouterr().out
    assert second == "This run was finished before: nothing was run again.\n\n" + first
    before.pop(tmp_path / "run" / ".lock")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    line = complaint(capsys, *words, "--gamma", "0.9")
    assert "holds another run (config.gamma is 0.99, not 0.9)" in line


@pytest.fixture
def fake_study(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A registry of one study; the dictionary receives what it was asked to do."""

    called: dict = {}

    def run(out: Path, **options: object) -> dict:
        called.update(options, out=out)
        out.mkdir()
        for name in ("report.html", "b.png", "a.png"):
            (out / name).touch()
        claims = [
            {"id": "C1", "verdict": "supported", "statement": "One holds."},
            {"id": "C20", "verdict": "inconclusive", "statement": "Who knows."},
        ]
        return {"claims": claims}

    monkeypatch.setitem(sys.modules, "fake_study", SimpleNamespace(run=run))
    entry = SimpleNamespace(summary="what it asks", module="fake_study", options=("ending",))
    monkeypatch.setattr(batchproof.study, "STUDIES", {"fake": entry}, raising=False)
    return called


@pytest.mark.parametrize("words", [["study"], ["study", "--list"], ["study", "fake", "--list"]])
def test_studies_are_listed(
    words: list[str], fake_study: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == "fake  what it asks\n"
    assert fake_study == {}


def test_a_study_runs_and_shows_its_verdicts(
    fake_study: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my study"
    words = ["study", "fake", "--seeds", "3", "--quick", "--ending", "both", "--no-progress"]
    assert main([*words, "--out", str(out)]) == 0
    assert fake_study == {
        "out": out,
        "seeds": 3,
        "steps": None,
        "quick": True,
        "conditions": None,
        "ending": "both",
        "progress": False,
        "command": f"batchproof {' '.join(words)} --out '{out}'",
    }
    assert capsys.readouterr().out.splitlines() == [
        "C1   supported     One holds.",
        "C20  inconclusive  Who knows.",
        "",
        str(out / "report.html"),
        str(out / "a.png"),
        str(out / "b.png"),
    ]


def test_a_study_needs_a_known_name_and_a_folder(
    fake_study: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "use one of fake" in complaint(capsys, "study", "fale", "--out", "never")
    assert "--out" in complaint(capsys, "study", "fake")


@pytest.mark.parametrize("has", [True, False, None])
def test_bfloat16_without_instructions_for_it_is_said_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    has: bool | None,
) -> None:
    from batchproof import compare, cpu
    from batchproof.lab import loop

    class Stopped(Exception):
        pass

    def stop(*args: object, **options: object) -> None:
        raise Stopped

    monkeypatch.setattr(cpu, "has_bfloat16", lambda: has)
    monkeypatch.setattr(loop, "train", stop)
    monkeypatch.setattr(compare, "run", stop)
    tasks = ["--env", ENV, "--out", str(tmp_path / "run")]
    one = f'env = "{ENV}"\n[[condition]]\nname = "rounded"\nalgo = "td3"\n'
    (tmp_path / "one.toml").write_text(f'{one}critic-precision = "bfloat16"\n')
    for words, rounded in [
        (["train", "td3", *tasks, "--critic-precision", "bfloat16"], True),
        (["train", "td3", *tasks], False),
        (["compare", "--algo", "td3,sac", *tasks, "--critic-precision", "bfloat16"], True),
        (["compare", str(tmp_path / "one.toml"), "--out", str(tmp_path / "run")], True),
        (["compare", "--algo", "td3,sac", *tasks], False),
    ]:
        with pytest.raises(Stopped):
            main(words)
        said = capsys.readouterr().err.count("no instructions for bfloat16")
        assert said == (rounded and has is False), words
