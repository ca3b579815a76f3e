"""Models come out of files as they went in; nothing is unpickled; damage is one line."""

import base64
import io
import json
import os
import pickle
import stat
import sys
import warnings
import zipfile

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from batchproof.cli import main
from batchproof.clinic.fix import fix
from batchproof.clinic.subject import Subject, fingerprint
from batchproof.errors import BatchproofError
from batchproof.sb3 import CnnPolicy, NatureCNN
from batchproof.sb3.adapter import subject_from_model
from batchproof.sb3.loading import _bounds, _dict, load_subject
from batchproof.sb3.modes import get_modes, set_modes
from batchproof.sb3.policies import NormTD3Policy

torch.set_num_threads(1)


class Marker:
    """Unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class OwnExtractor(FlattenExtractor):
    pass


SMALL = {"net_arch": [8]}
OBS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def make(algorithm, env="Pendulum-v1", policy="MlpPolicy", policy_kwargs=None, **more):
    if algorithm in (PPO, A2C):
        more = {"n_steps": 8, **more}
        if algorithm is PPO:
            more = {"batch_size": 8, **more}
    else:
        more = {"buffer_size": 100, "batch_size": 16, **more}
    kwargs = dict(SMALL if policy_kwargs is None else policy_kwargs)
    return algorithm(policy, env, policy_kwargs=kwargs, seed=0, device="cpu", **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "sac.zip"
    make(SAC).save(path)
    return path


def rewritten(source, target, compress=zipfile.ZIP_STORED, **members):
    """The same zip with other members; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compress) as new:
        for info in old.infolist():
            key = info.filename.replace(".", "_")
            content = members.pop(key, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    assert not members
    return target


def json_of(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


def with_json(source, target, change):
    data = json_of(source)
    change(data)
    return rewritten(source, target, data=json.dumps(data))


def refused(path, match=None, **more):
    more = {"obs": OBS, **more}
    with pytest.raises(BatchproofError, match=match) as caught:
        load_subject(path, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "env", "more"),
    [
        (SAC, "Pendulum-v1", {"ent_coef": "auto_0.1"}),
        (TD3, "Pendulum-v1", {"policy_kwargs": {"net_arch": {"pi": [8], "qf": [9, 7]}}}),
        (DDPG, "Pendulum-v1", {}),
        (TQC, "Pendulum-v1", {"policy_kwargs": {"net_arch": [8], "activation_fn": torch.nn.ELU}}),
        (CrossQ, "Pendulum-v1", {}),
        (DQN, "CartPole-v1", {}),
        (QRDQN, "CartPole-v1", {}),
        (PPO, "Pendulum-v1", {"use_sde": True}),
        (A2C, "CartPole-v1", {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [4]}}}),
    ],
)
def test_a_model_comes_back(tmp_path, algorithm, env, more, trust):
    model = make(algorithm, env, **more)
    obs = np.stack([model.observation_space.sample() for _ in range(16)])
    obs = np.clip(np.nan_to_num(obs), -5, 5)
    model.save(tmp_path / "m.zip")
    before = subject_from_model(model, obs)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if trust else "error")
        after = load_subject(tmp_path / "m.zip", obs=obs, trust=trust)
    if not trust:
        assert torch.equal(state[0], torch.get_rng_state())
        assert np.array_equal(state[1], np.random.get_state()[1])
    assert type(after.model) is algorithm
    assert after.name == "m.zip"
    assert torch.equal(before.act(before.obs), after.act(after.obs))
    assert torch.equal(before.policy(before.obs), after.policy(after.obs))
    for role, network in before.networks.items():
        own = after.networks[role].state_dict()
        assert all(torch.equal(own[key], value) for key, value in network.state_dict().items())
    for name in ("gamma", "tau", "batch_size", "policy_delay", "n_steps", "learning_rate"):
        assert getattr(after.model, name, None) == getattr(model, name, None), name
    assert after.model.observation_space == model.observation_space
    assert after.model.action_space == model.action_space
    held = {
        k: v.clone() for k, v in after.networks[next(iter(after.networks))].state_dict().items()
    }
    after.update()
    moved = after.networks[next(iter(after.networks))].state_dict()
    assert any(not torch.equal(held[key], moved[key]) for key in held)


def test_a_model_under_a_mode_plan_comes_back_under_it(tmp_path):
    model = make(TD3, policy=NormTD3Policy, policy_kwargs={"net_arch": [8], "norm": "batch"})
    set_modes(model, "TEETE")
    model.save(tmp_path / "m.zip")
    subject = load_subject(tmp_path / "m.zip", obs=OBS)
    assert get_modes(subject.model) == "TEETE"
    subject.update()


def test_observations_come_from_a_file_or_an_environment(saved, tmp_path):
    np.save(tmp_path / "obs.npy", OBS)
    assert torch.equal(load_subject(saved, obs=tmp_path / "obs.npy").obs, torch.as_tensor(OBS))
    subject = load_subject(saved, env="Pendulum-v1", count=70)
    assert subject.obs.shape == (70, 3)
    assert len(subject.transitions) == 70
    refused_by = pytest.raises(BatchproofError, match="holds no observations")
    with refused_by:
        load_subject(saved)
    with pytest.raises(BatchproofError, match=r"^observations: .*\(N, 3\), got \(16, 2\)"):
        load_subject(saved, obs=OBS[:, :2])
    np.save(tmp_path / "narrow.npy", OBS[:, :2])
    with pytest.raises(BatchproofError, match=r"^\S*narrow.npy: .*\(N, 3\), got \(16, 2\)"):
        load_subject(saved, obs=tmp_path / "narrow.npy")


def test_a_file_of_keys_is_named_too(tmp_path):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1)
    model = make(PPO, env, "CnnPolicy", policy_kwargs={})
    model.save(tmp_path / "m.zip")
    np.savez(tmp_path / "keys.npz", a=OBS, b=OBS)
    with pytest.raises(BatchproofError, match=r"^\S*keys.npz: .*the keys a, b"):
        load_subject(tmp_path / "m.zip", obs=tmp_path / "keys.npz")


@pytest.fixture(scope="module")
def normalized(tmp_path_factory):
    """A TD3 that was trained on observations and rewards that VecNormalize normalized."""
    folder = tmp_path_factory.mktemp("normalized")
    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]))
    kwargs = {"net_arch": [8], "norm": "batch"}
    model = make(TD3, env, NormTD3Policy, policy_kwargs=kwargs, learning_starts=20)
    model.learn(100)
    model.save(folder / "m.zip")
    env.save(str(folder / "norm.pkl"))
    return folder, env


def test_a_normalizer_s_file_goes_around_the_environment(normalized):
    folder, env = normalized
    kwargs = {"env": "Pendulum-v1", "count": 60}
    subject = load_subject(folder / "m.zip", trust=True, vecnormalize=folder / "norm.pkl", **kwargs)
    raw = load_subject(folder / "m.zip", **kwargs)
    # Both begin in the same state: the seed is the same. Rows are in no order of time.
    first = int(np.random.default_rng(0).permutation(60).argmin())
    expected = env.normalize_obs(raw.obs[first].numpy())
    np.testing.assert_allclose(subject.obs[first].numpy(), expected, atol=1e-5)
    # Rewards as well, or critics would be held against another scale than theirs.
    reward = float(raw.transitions.reward[0])
    assert float(subject.transitions.reward.abs().max()) <= env.clip_reward
    assert abs(reward) > 0
    found = subject.normalizers["train"]
    assert list(subject.normalizers) == ["train"]
    assert isinstance(found, VecNormalize)
    assert not found.training
    assert np.array_equal(found.obs_rms.mean, env.obs_rms.mean)
    assert found.obs_rms.count == env.obs_rms.count
    assert raw.normalizers == {}


def test_a_normalizer_s_file_is_not_unpickled_without_trust(normalized, tmp_path):
    folder, _ = normalized
    marker = tmp_path / "was-unpickled"
    (tmp_path / "armed.pkl").write_bytes(pickle.dumps(Marker(marker)))
    armed = {"vecnormalize": tmp_path / "armed.pkl", "env": "Pendulum-v1"}
    with pytest.raises(
        BatchproofError, match=r"armed.pkl: VecNormalize.save writes a pickle.*trust"
    ):
        load_subject(folder / "m.zip", **armed)
    assert not marker.exists()
    with pytest.raises(BatchproofError, match=r"armed.pkl: "):
        load_subject(folder / "m.zip", trust=True, **armed)
    assert marker.exists()  # the trap works


@pytest.mark.parametrize(
    ("content", "env", "match"),
    [
        (pickle.dumps([1]), "Pendulum-v1", "VecNormalize.load: AttributeError"),
        (b"hello", "Pendulum-v1", "VecNormalize.load: "),
        (None, "Pendulum-v1", "no such file"),
        (None, None, "goes around an environment"),
        ("the file", "CartPole-v1", "VecNormalize.load: .*shape"),
        ("the file", "around", "already"),
    ],
)
def test_a_normalizer_s_file_that_does_not_fit_is_one_line(
    normalized, tmp_path, content, env, match
):
    folder, around = normalized
    path = tmp_path / "n.pkl"
    if content is not None:
        path.write_bytes((folder / "norm.pkl").read_bytes() if content == "the file" else content)
    with pytest.raises(BatchproofError, match=match) as told:
        load_subject(
            folder / "m.zip",
            env=around if env == "around" else env,
            trust=True,
            vecnormalize=path,
        )
    assert "\n" not in str(told.value)


def test_the_command_line_puts_the_normalizer_there_too(normalized, capsys):
    folder, _ = normalized
    audit = ["audit", str(folder / "m.zip"), "--only", "BP5"]
    assert main([*audit, "--env", "Pendulum-v1"]) == 0
    assert "an environment id says nothing" in " ".join(capsys.readouterr().out.split())
    around = ["--vecnormalize", str(folder / "norm.pkl")]
    assert main([*audit, "--env", "Pendulum-v1", *around, "--trust"]) == 0
    assert "evaluation environment is not known" in " ".join(capsys.readouterr().out.split())
    trace = ["trace", str(folder / "m.zip"), "--env", "Pendulum-v1", *around, "--trust"]
    assert main(trace) == 0
    assert "plan TETTE" in capsys.readouterr().out
    for words, part in (
        ([*audit, *around, "--trust"], "add --env ID"),
        ([*audit, "--env", "Pendulum-v1", *around], "add --trust"),
        ([*audit, "--env", "Pendulum-v1", "--vecnormalize", str(folder)], "a folder: name a file"),
        ([*audit, "--obs", str(folder)], "a folder: name a file"),
        (["audit", "mine:make", *around, "--trust"], "leave it out"),
        (
            [*audit, "--env", "Pendulum-v1", *around, "--output", str(folder / "norm.pkl")],
            "never overwritten",
        ),
    ):
        assert main(words) == 2, words
        out, err = capsys.readouterr()
        assert out == ""
        assert part in err
        assert err.count("\n") == 1


def test_nothing_is_unpickled_without_trust(saved, tmp_path, monkeypatch):
    """Every pickle in the file would make a folder."""
    marker = tmp_path / "was-unpickled"
    pickled = base64.b64encode(pickle.dumps(Marker(marker))).decode()
    count = 0

    def arm(value):
        nonlocal count
        for key, item in value.items():
            if key == ":serialized:":
                value[key] = pickled
                count += 1
            elif isinstance(item, dict):
                arm(item)

    path = with_json(saved, tmp_path / "armed.zip", arm)
    assert count > 5
    load_subject(path, obs=OBS)
    assert not marker.exists()
    # The same file does run it when it is trusted: the trap works.
    refused(path, trust=True)
    assert marker.is_dir()


@pytest.mark.parametrize("member", ["policy_pth", "actor_optimizer_pth", "pytorch_variables_pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_are_pickles_are_refused(saved, tmp_path, member, zipped):
    marker = tmp_path / "was-unpickled"
    file = io.BytesIO()
    torch.save({"a": Marker(marker)}, file, _use_new_zipfile_serialization=zipped)
    path = rewritten(saved, tmp_path / "m.zip", **{member: file.getvalue()})
    refused(path, match="holds no plain weights")
    refused(path, match="holds no plain weights|load", trust=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["policy_class"].update(__module__="mine.policies"), "policy class mine"),
        (lambda d: d["policy_class"].update(__init__="<function Mine.__init__ at 0x>"), "Mine"),
        (lambda d: d.update(policy_class=None), "policy class unknown"),
        (lambda d: d["observation_space"].update({":type:": "<class 'mine.Space'>"}), "trust"),
        (lambda d: d["observation_space"].update(low="__import__('os')"), "trust"),
        (lambda d: d["observation_space"].update(_shape=[1 << 19, 1 << 19]), "trust"),
        (lambda d: d["observation_space"].update(_shape=[4]), "trust"),
        (lambda d: d["observation_space"].update(dtype="O"), "trust"),
        (lambda d: d["action_space"].update(low="[-2. ... -2.]", high="[1. ... 2.]"), "trust"),
        (lambda d: d.update(action_space=3), "trust"),
        (lambda d: d["policy_kwargs"].update(net_arch=[1 << 20, 1 << 20]), "weights are not"),
        (lambda d: d["policy_kwargs"].update(net_arch=[8] * 64), "weights are not"),
        (lambda d: d["policy_kwargs"].update(net_arch=[8] * 10**6), "net_arch"),
        (lambda d: d["policy_kwargs"].update(net_arch=[-1]), "net_arch"),
        (lambda d: d["policy_kwargs"].update(net_arch="[8]"), "net_arch"),
        (lambda d: d["policy_kwargs"].update(activation_fn="<class 'os.system'>"), "trust"),
        (lambda d: d["policy_kwargs"].update(unknown=1), "could be built"),
        (lambda d: d["policy_kwargs"].update(n_critics=10**8), "n_critics"),
        (lambda d: d.update(policy_kwargs=[1]), "policy_kwargs"),
        (lambda d: d.update(batch_size=0), "batch_size"),
        (lambda d: d.update(batch_size="x"), "batch_size"),
        (lambda d: d.update(gamma=True), "gamma"),
        (lambda d: d.update(gamma=float("nan")), "gamma"),
        (lambda d: d.update(ent_coef="auto_x"), "ent_coef"),
        (lambda d: d.pop("ent_coef"), "no algorithm"),
        (lambda d: d.clear(), "no algorithm"),
    ],
)
def test_other_settings_are_refused(saved, tmp_path, change, match):
    refused(with_json(saved, tmp_path / "m.zip", change), match=match)


def test_custom_parts_need_trust(tmp_path, monkeypatch):
    kwargs = {"net_arch": [8], "features_extractor_class": OwnExtractor}
    make(SAC, policy_kwargs=kwargs).save(tmp_path / "m.zip")
    refused(tmp_path / "m.zip", match=r"OwnExtractor.*--trust")
    monkeypatch.setitem(sys.modules, OwnExtractor.__module__, sys.modules[__name__])
    assert isinstance(load_subject(tmp_path / "m.zip", obs=OBS, trust=True), Subject)


class OwnPolicy(NormTD3Policy):
    """A policy that only a pickle holds."""


def fixed(policy, path):
    model = make(TD3, policy=policy, policy_kwargs={"net_arch": [8], "norm": "batch"})
    subject = subject_from_model(model, OBS)
    assert fix(subject, [], only=["replace-by-layer-norm"], unsafe=True)[0].applied
    model.save(path)
    return path


def test_a_fixed_policy_is_called_by_its_own_name(tmp_path):
    said = refused(fixed(OwnPolicy, tmp_path / "m.zip"), match=r"OwnPolicy, with layers that .*fix")
    assert "--trust" in said


def test_an_earlier_fix_is_named_and_no_module(tmp_path):
    def as_before(data):
        for key in ("batchproof_policy", "batchproof_edits"):
            del data["policy_class"][key]

    fixed(NormTD3Policy, tmp_path / "m.zip")
    path = with_json(tmp_path / "m.zip", tmp_path / "old.zip", as_before)
    said = refused(path, match="an earlier `batchproof fix`")
    assert "batchproof.clinic" not in said


EDITS = [1, "x", {}, [1], [{}], [{"path": "a"}]]


@pytest.mark.parametrize("edits", EDITS)
def test_damaged_edits_are_refused(edits, tmp_path):
    fixed(NormTD3Policy, tmp_path / "m.zip")
    path = with_json(
        tmp_path / "m.zip",
        tmp_path / "bad.zip",
        lambda data: data["policy_class"].update(batchproof_edits=edits),
    )
    refused(path, match="is damaged")


@pytest.mark.parametrize(
    "change",
    [{"mean": "forward"}, {"mean": "__class__"}, {"scale": "train"}, {"path": "mu." * 300},
     {"old": "os.system"}, {"kind": "group"}, {"shift": ""}],
)  # fmt: skip
def test_strange_edits_are_refused_or_harmless(change, tmp_path):
    def strange(data):
        for edit in data["policy_class"]["batchproof_edits"]:
            edit.update(change)

    fixed(NormTD3Policy, tmp_path / "m.zip")
    path = with_json(tmp_path / "m.zip", tmp_path / "bad.zip", strange)
    if change in ({"kind": "group"}, {"shift": ""}):  # the same names and shapes
        load_subject(path, obs=OBS)
    else:
        refused(path)


def test_too_many_edits_are_refused(tmp_path):
    def many(data):
        data["policy_class"]["batchproof_edits"] *= 1000

    fixed(NormTD3Policy, tmp_path / "m.zip")
    refused(with_json(tmp_path / "m.zip", tmp_path / "bad.zip", many), match="is damaged")


@pytest.mark.parametrize("policy", ["CnnPolicy", CnnPolicy])
def test_our_own_extractor_and_policy_need_none(tmp_path, policy):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1)
    kwargs = {"features_extractor_class": NatureCNN, "features_extractor_kwargs": {"norm": "batch"}}
    model = make(PPO, env, policy, policy_kwargs=kwargs)
    model.save(tmp_path / "m.zip")
    obs = np.random.default_rng(0).integers(256, size=(4, 1, 40, 40), dtype=np.uint8)
    before = subject_from_model(model, obs=obs)
    after = load_subject(tmp_path / "m.zip", obs=obs)
    assert torch.equal(before.act(before.obs), after.act(after.obs))
    assert any(
        "BatchNorm" in type(m).__name__ for n in after.networks.values() for m in n.modules()
    )


def test_unsafe_archives(saved, tmp_path):
    def with_member(name, content=b"", **attributes):
        path = tmp_path / "m.zip"
        path.write_bytes(saved.read_bytes())
        info = zipfile.ZipInfo(name)
        for key, value in attributes.items():
            setattr(info, key, value)
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")  # about the name that is there twice
            archive.writestr(info, content, attributes.get("compress_type"))
        return path

    refused(with_member("../evil"), match="unsafe: it holds the path")
    refused(with_member("/etc/passwd"), match="unsafe: it holds the path")
    refused(with_member("C:\\evil"), match="unsafe: it holds the path")
    link = (stat.S_IFLNK | 0o777) << 16
    refused(with_member("link", b"/etc/passwd", external_attr=link), match="symbolic link")
    refused(with_member("data", b"{}"), match="two files")
    bomb = {"compress_type": zipfile.ZIP_DEFLATED}
    refused(with_member("x.pth", bytes(8 << 20), **bomb), match="unpacks from")
    raw = bytearray(saved.read_bytes())
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1  # in the directory's last entry
    (tmp_path / "e.zip").write_bytes(raw)
    refused(tmp_path / "e.zip", match="encrypted")


def test_packed_archives_are_read(saved, tmp_path):
    path = rewritten(saved, tmp_path / "m.zip", zipfile.ZIP_DEFLATED)
    expected = load_subject(saved, obs=OBS)
    packed = load_subject(path, obs=OBS)
    assert torch.equal(packed.act(packed.obs), expected.act(expected.obs))


def test_foreign_files(saved, tmp_path):
    refused(tmp_path / "gone.zip", match="no such file")
    refused(tmp_path, match="is a folder")
    (tmp_path / "t.zip").write_text("hello")
    refused(tmp_path / "t.zip", match="damaged .zip")
    (tmp_path / "t.pkl").write_bytes(pickle.dumps([1]))
    refused(tmp_path / "t.pkl", match="no Stable-Baselines3 .zip")
    (tmp_path / "empty.zip").write_bytes(b"")
    refused(tmp_path / "empty.zip")
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", match="a torch.save file")
    with zipfile.ZipFile(tmp_path / "ts.pt", "w") as archive:
        archive.writestr("ts/data.pkl", b"")
        archive.writestr("ts/code/__torch__.py", b"")
    refused(tmp_path / "ts.pt", match="a TorchScript file")
    with zipfile.ZipFile(tmp_path / "e.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", b"{}")
    refused(tmp_path / "e.pt2", match=r"a torch.export file")
    with zipfile.ZipFile(tmp_path / "o.zip", "w") as archive:
        archive.writestr("readme.txt", b"")
    refused(tmp_path / "o.zip", match="no Stable-Baselines3 .zip")
    refused(rewritten(saved, tmp_path / "w.zip", policy_pth=None), match="without weights")
    refused(rewritten(saved, tmp_path / "d.zip", data=b"[1]"), match="is a list")
    refused(rewritten(saved, tmp_path / "d.zip", data=b"\xff"), match="not JSON")
    refused(rewritten(saved, tmp_path / "d.zip", data=b"[" * 10**5), match="not JSON")


def test_a_file_that_was_cut_short_is_called_so(saved, tmp_path):
    """Half of it ends in weights, which are an archive of their own."""
    raw = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".pth"))
        info = archive.getinfo(name)
    end = raw.index(b"PK\x05\x06", info.header_offset) + 22  # of the archive within
    for cut in (end, end + 40):
        (tmp_path / "cut.zip").write_bytes(raw[:cut])
        refused(tmp_path / "cut.zip", match="a .zip that was cut short")


def state_as(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "value", [[1], {"a": 1}, {1: torch.zeros(2)}, {}, {"actor.mu.weight": torch.zeros(2)}, 3]
)
def test_wrong_weights(saved, tmp_path, value):
    refused(rewritten(saved, tmp_path / "m.zip", policy_pth=state_as(value)))


@pytest.mark.parametrize("value", [{"log_ent_coef": torch.zeros(3)}, {"log_ent_coef": 1}, [1]])
def test_wrong_variables(saved, tmp_path, value):
    refused(rewritten(saved, tmp_path / "m.zip", pytorch_variables_pth=state_as(value)))


def test_wrong_optimizer(saved, tmp_path):
    for value in ({}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": [{}]}):
        refused(rewritten(saved, tmp_path / "m.zip", actor_optimizer_pth=state_as(value)))


def test_fuzzed_files_are_read_or_refused(saved, tmp_path):
    rng = np.random.default_rng(0)
    raw = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        data = archive.read("data")
    path = tmp_path / "fuzzed.zip"

    def examine():
        try:
            subject = load_subject(path, obs=OBS)
        except BatchproofError as error:
            line = str(error)
            return "refused" if "\n" not in line and str(path) in line else line
        fingerprint(subject)
        return "read"

    outcomes = []
    for cut in rng.integers(0, len(raw), 40):
        path.write_bytes(raw[:cut])
        outcomes.append(examine())
    assert set(outcomes) == {"refused"}, "a truncated file was read"
    for _ in range(120):
        changed = bytearray(raw)
        # Half of the damage goes to the directory and the headers, where checksums do not look.
        spot = rng.integers(len(raw)) if rng.random() < 0.5 else -1 - rng.integers(800)
        changed[spot] = rng.integers(256)
        path.write_bytes(changed)
        outcomes.append(examine())
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            changed[rng.integers(len(data))] = rng.integers(32, 127)
        rewritten(saved, path, data=bytes(changed))
        outcomes.append(examine())
    values = [None, True, -1, 0, 10**30, 1e308, "x", "[1.]", [], [1], {}, {"a": {}}]
    names = sorted(json_of(saved))
    for name in names:
        value = values[rng.integers(len(values))]
        with_json(saved, path, lambda d, n=name, v=value: d.update({n: v}))
        outcomes.append(examine())
    assert set(outcomes) == {"refused", "read"}


def test_spaces_are_read_from_text():
    assert np.array_equal(_bounds("[[-1.  2.]\n [ inf -3e-2]]", (2, 2)), [[-1, 2], [np.inf, -0.03]])
    assert np.array_equal(_bounds("[[0 0 ... 0 0]]", (50, 50)), np.zeros((50, 50)))
    for text, shape in (("[1. 2. ... 3.]", (9,)), ("[1. 2.]", (3,)), ("", (1,)), ("[nan]", (1,))):
        with pytest.raises(ValueError):
            _bounds(text, shape)
    given = spaces.Dict(
        {
            "a": spaces.Box(np.float32([-1, -2]), np.float32([1, np.inf])),
            "b": spaces.Box(0, 255, (3, 36, 36), np.uint8),
            "c": spaces.Discrete(5),
            "d": spaces.Discrete(5, start=-1),
            "e": spaces.MultiBinary(4),
            "f": spaces.MultiDiscrete([2, 3]),
        }
    )
    text = str(dict(given.spaces))
    assert _dict(text) == given
    for bad in (text[:-1], text + " ", text.replace("Discrete", "Exec"), "{}x", "[]"):
        with pytest.raises(ValueError):
            _dict(bad)
