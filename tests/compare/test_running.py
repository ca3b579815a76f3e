"""Running a comparison: what is kept, added, stopped and continued."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from batchproof import compare
from batchproof.cli import main, parser
from batchproof.compare import work
from batchproof.lab import loop, off_policy, population

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
        parser().parse_args(shlex.split(command)[1:])
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


def test_a_setting_that_is_newer_than_a_finished_run_has_its_default_there(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    for path in out.glob("cells/*/*/*/run.json"):
        record = json.loads(path.read_text())
        del record["training"]["normalize_obs"], record["checksum"]
        path.write_text(json.dumps(record))
    before = times(out)
    assert returns(run(f"{SMALL} --seeds 2", out)) == returns(whole[1])
    assert changed(out, before) == set()


def test_other_settings_need_another_folder(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    words = f"{SMALL} --seeds 2 --buffer-size 50 --env {ENV} --out {out}"
    assert main(["compare", *shlex.split(words)]) == 2
    assert "(buffer_size is 1000000, not 50)" in capsys.readouterr().err


def test_a_budget_stops_in_time_and_the_same_command_continues_exactly(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No time at all, and one population begun: it stops at its first evaluation.
    with pytest.MonkeyPatch.context() as patch:
        start = work.Clock.__init__
        patch.setattr(work.Clock, "__init__", lambda clock, _: start(clock, 0.0))
        patch.setattr(work.Clock, "has_time", lambda clock: True)
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
    # Fewer seeds than were begun together: said before any time goes into the others.
    capsys.readouterr()
    words = f"{SMALL} --seeds 1 --list --env {ENV} --out {tmp_path}"
    assert main(["compare", *shlex.split(words)]) == 0
    assert f"{ENV} ddpg-none was begun with seeds 1 too: they go on" in capsys.readouterr().out
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
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    clock = work.Clock(deadline=130.0)
    assert clock.has_time()
    clock.start()
    for moment, over in ((112.0, False), (117.0, False), (122.0, False), (127.0, True)):
        now[0] = moment
        assert clock.is_over() == over  # 127 + 5 is past 130
    # The quickest start took 12 seconds: with 3 left, no other is begun.
    assert not clock.has_time()
    now[0] = 117.0
    assert clock.has_time()
    assert not work.Clock(None).is_over()


def test_interrupts_leave_a_state_that_resumes(
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A test run in the background of a shell may have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    advance = off_policy.Stepper.advance

    def interrupted(count: int, number: signal.Signals) -> Callable[..., None]:
        def pressing(stepper: off_policy.Stepper, last: int, *rest: Any) -> None:
            for _ in range(count):
                signal.raise_signal(number)
            advance(stepper, last, *rest)

        return pressing

    # One Ctrl-C or SIGTERM ends with the evaluation at the end of the interval, two Ctrl-C within.
    both = signal.SIGINT, signal.SIGTERM
    for count, number, done in ((1, both[0], 1), (1, both[1], 2), (2, both[0], 2)):
        with monkeypatch.context() as patch:
            patch.setattr(off_policy.Stepper, "advance", interrupted(count, number))
            record = run(f"{SMALL} --seeds 2", tmp_path, code=130)
        assert record["status"] == "interrupted"
        assert states(record) == {
            "ddpg-none": f"stopped at {done * EVERY} of {STEPS}",
            "ddpg-critic:batch": "waiting",
        }
        assert "Interrupted: 0 of 2 cells are finished; the same command continues." in (
            capsys.readouterr().out
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
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
        record = run(words, out, code=2, env=f"{ENV},Nope-v0")
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


def test_listing_says_what_is_there_already(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    before = times(out)
    words = SMALL.replace("none,", "none,layer,") + f" --seeds 2 --env {ENV} --out {out} --list"
    assert main(["compare", *shlex.split(words)]) == 0
    assert f"In {out}: 2 finished, 1 waiting" in capsys.readouterr().out
    assert changed(out, before) == set()
    assert main(["compare", *shlex.split(words), "--gamma", "0.5"]) == 2
    assert "(config.gamma is 0.99, not 0.5)" in capsys.readouterr().err


def test_listing_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", *shlex.split(SMALL), "--env", ENV, "--out", str(out), "--list"]) == 0
    shown = capsys.readouterr().out
    assert "ddpg-critic:batch" in shown
    assert "2 conditions on batchproof/ConstantReward-v0: 2 cells of 5 seeds" in shown
    assert not out.exists()
