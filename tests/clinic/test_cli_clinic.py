"""The clinic's commands: exit codes, one line for each mistake, and what is written where."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from batchproof.cli import main

FACTORIES = """
import torch
from torch import nn

from batchproof.clinic import Subject


def net(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))


def healthy():
    return net(nn.LayerNorm).eval()


def coupled():
    return net(nn.BatchNorm1d).train()


def subject():
    return Subject.from_module(coupled(), torch.randn(32, 3), name="mine")


def boom():
    raise RuntimeError("no\\nweights")


def leave():
    raise SystemExit(0)


def skip():
    import pytest

    pytest.skip("not today")


def text():
    return "text"


NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with factories in a module and observations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clinic_patients.py").write_text(FACTORIES)
    obs = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    np.save(tmp_path / "obs.npy", obs)
    np.save(tmp_path / "wide.npy", np.tile(obs, 2))
    (tmp_path / "empty.zip").touch()
    yield tmp_path
    sys.modules.pop("clinic_patients", None)


def call(*words: str) -> int:
    return main(list(words))


HEALTHY = ("audit", "clinic_patients:healthy", "--trust", "--obs", "obs.npy", "--only", "BP1")
COUPLED = ("audit", "clinic_patients:coupled", "--trust", "--obs", "obs.npy", "--only", "BP1")

MISTAKES = {
    "no model": (["audit"], "MODEL"),
    "no such file": (["audit", "none.zip"], "none.zip: no such file; MODEL is a Stable-Basel"),
    "empty model": (["audit", ""], "must name a file"),
    "no zip": (["audit", "empty.zip"], "empty.zip"),
    "code without trust": (["audit", "clinic_patients:healthy"], "add --trust"),
    "env of a module": ([*HEALTHY, "--env", "Pendulum-v1"], "--env has no effect"),
    "no observations": (["audit", "clinic_patients:healthy", "--trust"], "--obs FILE"),
    "missing observations": (["audit", "empty.zip", "--obs", "no.npy"], "no.npy: no such file"),
    "other observations": (
        ["audit", "clinic_patients:healthy", "--trust", "--obs", "wide.npy"],
        "cannot take these observations, (32, 6)",
    ),
    "unknown format": ([*HEALTHY, "--format", "xml"], "use one of text, json, sarif, junit, html"),
    "bad code": (["audit", "empty.zip", "--only", "BPX"], "unknown rule 'BPX'"),
    "unknown code": (["audit", "empty.zip", "--only", "BP199"], "unknown rule 'BP199'"),
    "unknown ignored code": (["audit", "empty.zip", "--ignore", "BP9"], "unknown rule 'BP9'"),
    "no folder": ([*HEALTHY, "--output", "no/out.json"], "folder does not exist"),
    "no module": (["audit", "no_such_module:f", "--trust"], "no_such_module"),
    "no function": (["audit", "clinic_patients:nothing", "--trust"], "nothing"),
    "their error": (["audit", "clinic_patients:boom", "--trust"], "RuntimeError: no weights"),
    "their text": (["audit", "clinic_patients:text", "--trust"], "gave a str"),
    "no update": (["trace", "clinic_patients:subject", "--trust"], "update"),
    "fix onto itself": (["fix", "empty.zip", "-o", "./empty.zip"], "never overwritten"),
    "fix without out": (["fix", "empty.zip"], "--output"),
    "fix of no zip": (["fix", "empty.zip", "-o", "out.pt"], "out.pt.zip"),
    "fix of a module": (
        ["fix", "clinic_patients:subject", "--trust", "-o", "out.zip"],
        "batchproof.clinic.fix in Python",
    ),
    "unknown fix": (
        ["fix", "clinic_patients:subject", "--trust", "-o", "out.zip", "--only", "mend"],
        "'mend' is neither a rule nor a fix",
    ),
    "explain nothing": (["explain"], "CODE"),
    "explain no code": (["explain", "norm"], "BP and three digits"),
    "explain an unknown code": (["explain", "BP999"], "unknown rule 'BP999'"),
}


@pytest.mark.parametrize(("words", "part"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(words, part, folder, capsys):
    before = sorted(p for p in folder.iterdir() if p.name != "__pycache__")
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("batchproof: error: ")
    assert err.count("\n") == 1
    assert part in err
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


def test_exit_code_tells_findings_from_none(folder, capsys):
    assert call(*HEALTHY) == 0
    assert "failed" not in capsys.readouterr().out
    assert call(*COUPLED) == 1
    out, err = capsys.readouterr()
    assert "FAIL BP1" in out
    assert err == ""


def test_what_is_ignored_does_not_fail(folder, capsys):
    assert call(*COUPLED, "--only", "BP101,BP201") == 1
    capsys.readouterr()
    assert call(*COUPLED, "--only", "BP101,BP201", "--ignore", "bp101") == 0
    out = capsys.readouterr().out
    assert "BP201" in out
    assert "BP101" not in out


def test_an_audit_of_no_rule_is_a_mistake_and_no_success(folder, capsys):
    for words, part in (
        (["--only", "BP3", "--ignore", "bp3"], "--ignore BP3 leaves no rule of --only BP3 to run"),
        (["--only", "BP301,BP302", "--ignore", "BP"], "leaves no rule of --only BP301,BP302"),
    ):
        assert call(*HEALTHY[:5], *words) == 2
        assert part in capsys.readouterr().err
    assert call(*HEALTHY[:5], "--ignore", "BP") == 2  # all but those on request would be skipped
    assert "--ignore BP leaves no rule to run" in capsys.readouterr().err


def test_code_that_ends_python_is_no_audit_that_passed(folder, capsys, monkeypatch):
    (folder / "clinic_leaves.py").write_text("import sys\nsys.exit(0)\n")
    for reference in ("clinic_leaves:model", "clinic_patients:leave"):
        assert call("audit", reference, "--trust", "--obs", "obs.npy") == 2
        assert f"{reference}: SystemExit: 0" in capsys.readouterr().err
    assert call("audit", "clinic_patients:skip", "--trust", "--obs", "obs.npy") == 2
    assert "not today" in capsys.readouterr().err

    from batchproof.sb3 import loading

    monkeypatch.setattr(loading, "load_subject", lambda *args, **more: sys.exit(0))
    assert call("audit", "empty.zip", "--trust") == 2  # what its pickle may do
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "ended Python (sys.exit(0)) before the command was done" in err


OUTPUTS = {
    "a model": (["audit", "empty.zip", "--output", "empty.zip"], "is what this command reads"),
    "observations": ([*HEALTHY, "--output", "obs.npy"], "is what this command reads"),
    "a link to them": ([*HEALTHY, "--output", "link.npy"], "is what this command reads"),
    "a trace's": (["trace", *HEALTHY[1:5], "-o", "obs.npy"], "is what this command reads"),
    "code": ([*HEALTHY, "--out", "clinic_patients.py"], "is what this command reads"),
    "a fix's observations": (
        ["fix", "empty.zip", "--obs", "obs.zip", "-o", "obs.zip"],
        "is what this command reads",
    ),
    "a record": ([*HEALTHY, "--output", "run.json"], "a run's own record"),
    "a study's": ([*HEALTHY, "--output", "sub/study.json"], "a run's own record"),
    "a checkpoint": ([*HEALTHY, "--output", "sub/checkpoint/x.html"], "a run's own record"),
    "a folder": ([*HEALTHY, "--output", "."], "is a folder: name a file"),
    "the root": (["trace", *HEALTHY[1:5], "--output", "/"], "is a folder: name a file"),
    # Never a device: root would replace it where the guard is broken.
    "a pipe": ([*HEALTHY, "--output", "pipe"], "is a device or a pipe"),
}


@pytest.mark.parametrize(("words", "part"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_never_takes_the_place_of_what_counts(words, part, folder, capsys):
    (folder / "sub/checkpoint").mkdir(parents=True)
    (folder / "sub/run.json").write_text("{}")
    (folder / "link.npy").symlink_to("obs.npy")
    (folder / "obs.zip").touch()
    os.mkfifo(folder / "pipe")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert part in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_fix_says_that_it_takes_no_run(capsys):
    assert call("fix", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the folder of a `batchproof train` run" not in shown
    assert "such as `batchproof export RUN --format sb3` writes" in shown


def test_a_subject_brings_its_observations(folder, capsys):
    assert call("audit", "clinic_patients:subject", "--trust", "--only", "BP1") == 1
    assert capsys.readouterr().out.startswith("mine: ")


def test_formats_are_written_where_asked(folder, capsys):
    assert call(*COUPLED, "--format", "json", "--output", "out.json") == 1
    assert json.loads((folder / "out.json").read_text())["clean"] is False
    assert capsys.readouterr().out.startswith("out.json: ")
    assert call(*COUPLED, "--format", "sarif") == 1
    assert json.loads(capsys.readouterr().out)["version"] == "2.1.0"
    assert call(*COUPLED, "--format", "junit") == 1
    assert ElementTree.fromstring(capsys.readouterr().out).tag == "testsuites"
    assert call(*COUPLED, "--format", "html", "--output", "page.html") == 1
    assert (folder / "page.html").read_text().startswith("<!doctype html>")


def test_explain_prints_the_rule_and_rules_lists_it(capsys):
    assert call("explain", "bp101") == 0
    shown = capsys.readouterr().out
    for head in ("BP101", "How it is detected", "Why it matters", "What to do", "References"):
        assert head in shown
    assert call("rules") == 0
    listed = capsys.readouterr().out
    for code in ("BP101", "BP203", "BP304", "BP401", "BP501", "BP601"):
        assert f"  {code}  " in listed


def test_rules_in_python_and_in_cli_name_the_same_formats():
    from batchproof.cli.clinic import FORMATS
    from batchproof.clinic import formats

    assert tuple(formats.FORMATS) == FORMATS


@pytest.fixture(scope="module")
def td3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TD3 with batch norm after a few updates."""
    sb3 = pytest.importorskip("stable_baselines3")
    from batchproof.sb3.policies import NormTD3Policy

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model") / "td3.zip"
    model = sb3.TD3(
        NormTD3Policy,
        "Pendulum-v1",
        policy_kwargs={"net_arch": [8, 8], "norm": "batch"},
        learning_starts=30,
        batch_size=16,
        seed=0,
        device="cpu",
    )
    model.learn(60)
    model.save(path)
    return path


def test_a_real_td3_is_audited_and_traced(td3, capsys):
    before = td3.read_bytes()
    assert call("audit", str(td3), "--env", "Pendulum-v1", "--only", "BP304") == 1
    shown = capsys.readouterr().out
    assert "FAIL BP304" in shown
    assert "slot 3" in shown
    assert call("trace", str(td3), "--env", "Pendulum-v1", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "TETTE"
    assert call("audit", str(td3)) == 2
    assert "--env" in capsys.readouterr().err
    assert td3.read_bytes() == before


def test_a_real_td3_is_fixed_into_another_file(td3, tmp_path, capsys):
    from stable_baselines3 import TD3

    before, out = td3.read_bytes(), tmp_path / "fixed.zip"
    words = ["fix", str(td3), "-o", str(out), "--env", "Pendulum-v1", "--only", "BP304"]
    call(*words)
    assert "add --unsafe" in capsys.readouterr().out
    assert not out.exists()
    call(*words, "--unsafe")
    shown = capsys.readouterr().out
    assert "applied set-modes (BP304)" in shown
    assert td3.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.zip"]
    TD3.load(out)


def test_early_mistakes_and_help_import_nothing_heavy():
    script = """
import subprocess
import sys
from batchproof.cli import main
for words in (["audit"], ["audit", "none.zip"], ["audit", "a:b"], ["audit", "x.zip", "--only", "x"],
              ["audit", "--help"], ["trace", "none.zip"], ["fix", "none.zip", "-o", "out.zip"],
              ["explain", "norm"]):
    main(words)
assert not {"torch", "numpy", "jax", "stable_baselines3"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
