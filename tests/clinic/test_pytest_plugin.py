"""The fixture and the assertion, in a test suite of somebody else's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.clinic import Subject
from batchproof.errors import BatchproofError
from batchproof.testing import assert_batchproof

SUITE = """
import sys

import torch
from torch import nn

OBS = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


def test_nothing_heavy_before_use(batchproof_audit):
    pass


def test_sound(batchproof_audit):
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    report = batchproof_audit(net, OBS, only=["BP1"])
    assert report.clean


def test_coupled(batchproof_audit):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    batchproof_audit(net, OBS, only=["BP1"])
"""


def coupled():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()


OBS = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)


def test_fixture_fails_the_test_with_the_report(tmp_path: Path):
    (tmp_path / "test_theirs.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # Installing the package is enough: pytest finds the plugin by its entry point.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_theirs.py::test_coupled" in done.stdout
    assert "What to do:" in done.stdout


def test_plugin_imports_nothing_heavy():
    script = (
        "import sys, batchproof.pytest_plugin, batchproof.testing; "
        "sys.exit(bool({'torch', 'numpy', 'stable_baselines3', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda obs: net(obs)])
def test_assertion_carries_the_text_report(wrap):
    with pytest.raises(AssertionError, match="FAIL BP1"):
        assert_batchproof(wrap(coupled()), OBS, only=["BP1"])


def test_subject_brings_its_observations():
    subject = Subject.from_module(coupled(), torch.from_numpy(OBS))
    with pytest.raises(AssertionError, match="FAIL BP1"):
        assert_batchproof(subject, only=["BP1"])
    subject = Subject.from_module(coupled().eval(), torch.from_numpy(OBS))
    assert assert_batchproof(subject, only=["BP1"]).clean


def test_a_module_needs_observations():
    with pytest.raises(BatchproofError, match=r"assert_batchproof\(policy, obs\)"):
        assert_batchproof(coupled())


@pytest.fixture(params=["function", "fixture"])
def door(request):
    """Both ways in: the assertion and the plugin's fixture."""
    if request.param == "function":
        return assert_batchproof
    return request.getfixturevalue("batchproof_audit")


@pytest.mark.parametrize(
    ("policy", "obs", "match"),
    [
        (coupled(), OBS[:, :2], r"cannot take these observations, \(32, 2\): RuntimeError"),
        (lambda x: coupled()(x), OBS.astype(float), "cannot take these observations"),
        ("td3.zip", OBS, "a str is no policy"),
        (Path("td3.zip"), OBS, "is no policy"),
        (lambda x: None, OBS, "gave a NoneType"),
        (lambda x: x.mean(), OBS, "gives 0 rows for 2"),
        (lambda x: x.mean(0, keepdim=True), OBS, "gives 1 rows for 2"),
        (lambda x: x["a"], {"a": OBS, "b": OBS[:9]}, "equally many rows, got a 32, b 9"),
        (coupled(), {}, "equally many rows, got none"),
        (coupled(), 1.0, "need a batch axis"),
        (coupled(), [["a"] * 3] * 4, "no array of numbers"),
        (coupled(), [[1.0, 2.0, 3.0], [1.0]], "no array of numbers"),
    ],
)
def test_what_cannot_run_does_not_pass(door, policy, obs, match):
    with pytest.raises(BatchproofError, match=match) as caught:
        door(policy, obs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [np.float32, np.float64, np.float16])
def test_observations_follow_the_type_of_the_weights(door, kind, given):
    with pytest.raises(AssertionError, match="FAIL BP101"):
        door(coupled().to(kind), OBS.astype(given), only=["BP1"])
    report = door(coupled().eval().to(kind), OBS.astype(given), ignore="BP401")
    assert not [o for o in report.outcomes.values() if o.reason.startswith("could not run")]
    # Three digits are enough to see which buffers follow the batch.
    assert [layer.mean_buffer for layer in report.facts] == ["running_mean"]
    # A subject that is given others casts them too.
    subject = Subject.from_module(coupled().eval().to(kind), torch.from_numpy(OBS))
    assert door(subject, OBS.astype(given), only="BP1").clean


def test_whole_numbers_stay_whole(door):
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 2)).double()
    assert door(net, np.arange(5)[:, None], only="BP101").outcomes["BP101"].status == "pass"


def test_a_single_code_needs_no_list(door):
    with pytest.raises(AssertionError, match="FAIL BP1"):
        door(coupled(), OBS, only="BP1")
    assert set(door(coupled(), OBS, only="BP404").outcomes) == {"BP404"}
    assert door(coupled(), OBS, only="bp1", ignore="BP1").clean
    with pytest.raises(BatchproofError, match="unknown rule 'B'"):
        door(coupled(), OBS, only="B")


def test_what_is_ignored_does_not_fail():
    assert assert_batchproof(coupled(), OBS, only=["BP1"], ignore=["BP1"]).clean
