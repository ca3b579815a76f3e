"""Exports of lab runs: the same actions and Q in torch, ONNX and Stable-Baselines3, or no file."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from batchproof import cli, export, records, run_record
from batchproof.clinic import rules
from batchproof.errors import BatchproofError
from batchproof.export import LabRun, read_run
from batchproof.lab import checkpoint, load, nets, obs_norm, off_policy, replay
from batchproof.lab.agents import AGENTS, crossq, ddpg, maddpg, reinforce, sac, td3, xqc
from batchproof.lab.envs.layout import Layout
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import E, Plan
from batchproof.report import data

OBS, ACTION, SEEDS = 3, 1, (7, 5)  # Pendulum's sizes
DROPPED = object()
TEAM = Layout(("left", "right", "far"), (2, 3, 2), (1, 2, 1), "sum")
ALIKE = Layout(("left", "right"), (2, 2), (1, 1), "sum")


def net(kind: str, placement: str = "pre", **options: Any) -> MLP:
    return MLP((8, 4), Norm(kind, placement, groups=2, eps=1e-3), **options)


torch.set_num_threads(1)

RUNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "td3": ("td3", td3.Config(actor=net("batch"), critic=net("batch")), {"normalize_obs": True}),
    "sb3-td3": ("td3", td3.Config(actor=net("batch"), critic=net("batch")), {}),
    "sac": ("sac", sac.Config(actor=net("renorm", "input+post"), critic=net("rms")), {}),
    "sb3-sac": ("sac", sac.Config(actor=net("none"), critic=net("renorm"), critics=3), {}),
    "ddpg": (
        "ddpg",
        ddpg.Config(actor=net("batch", "before-action"), critic=net("batch", "before-action")),
        {},
    ),
    "sb3-ddpg": ("ddpg", ddpg.Config(actor=net("layer"), critic=net("layer")), {}),
    "crossq": ("crossq", crossq.Config(actor=net("layer"), critic=net("group", "post")), {}),
    "sb3-crossq": (
        "crossq",
        crossq.Config(
            actor=MLP((8, 4), replace(crossq.RENORM, momentum=0.02, eps=2e-3)),
            critic=MLP((8, 6), replace(crossq.RENORM, momentum=0.02, eps=2e-3)),
            critics=3,
            adam_b1=0.6,
            initial_alpha=0.3,
            entropy_per_dimension=-0.5,
        ),
        {},
    ),
    "crossq-blind": (
        "crossq",
        crossq.Config(
            actor=MLP((8, 4), crossq.RENORM),
            critic=MLP((8, 4), crossq.RENORM),
            plan=Plan.parse("TETJJ"),
        ),
        {},
    ),
    "crossq-targets": (
        "crossq",
        crossq.Config(
            actor=MLP((8, 4), crossq.RENORM),
            critic=MLP((8, 4), crossq.RENORM),
            target_network=True,
        ),
        {},
    ),
    "xqc": (
        "xqc",
        replace(
            xqc.Config(),
            actor=net("batch", "input+pre", bias=False),
            critic=net("batch", "input+pre", bias=False),
            atoms=11,
        ),
        {},
    ),
    "seeing": (
        "td3",
        td3.Config(actor=net("batch"), critic=net("batch"), plan=Plan.parse("TEETE")),
        {},
    ),
    "ma-bn": (
        "td3",
        td3.Config(actor=net("batch"), critic=net("batch"), plan=Plan.parse("TTETT")),
        {},
    ),
    "joint": ("crossq", crossq.Config(actor=net("batch"), critic=net("batch")), {}),
    "apart": (
        "crossq",
        crossq.Config(actor=net("batch"), critic=net("batch"), plan=Plan.parse("TEETE")),
        {},
    ),
    "skipped": ("td3", td3.Config(actor=net("batch"), plan=Plan.parse("BTETTE")), {}),
    "batch": ("td3", td3.Config(actor=net("batch"), plan=Plan.parse("TTETTE")), {}),
    "reinforce": ("reinforce", reinforce.Config(actor=net("batch", "pre+post")), {}),
    "team": ("maddpg", maddpg.Config(actor=net("batch"), critic=net("batch")), {"layout": TEAM}),
    "alone": (
        "maddpg",
        maddpg.Config(actor=net("batch"), critic=net("layer"), centralized=False),
        {"layout": TEAM, "normalize_obs": True},
    ),
    "shared": (
        "maddpg",
        maddpg.Config(actor=net("batch"), critic=net("batch"), share_parameters=True),
        {"layout": ALIKE},
    ),
}


def write_run(folder: Path, name: str) -> None:
    """A run's folder as the loop leaves it, with random networks and statistics."""
    algo, config, options = RUNS[name]
    layout = options.get("layout")
    training = Training(
        algo,
        config,
        "Pendulum-v1",
        seeds=SEEDS,
        steps=3000,
        learning_starts=0 if algo == "reinforce" else 100,
        normalize_obs=options.get("normalize_obs", False),
    )
    sizes = (sum(layout.obs_sizes), sum(layout.action_sizes)) if layout else (OBS, ACTION)
    arguments = (layout,) if layout else sizes

    def init(key: Any) -> Any:
        moments = obs_norm.init((sizes[0],)) if training.normalize_obs else None
        return {"agent": training.agent.init(config, key, *arguments), "obs_moments": moments}

    tree = jax.eval_shape(jax.vmap(init), jax.vmap(jax.random.key)(jnp.arange(len(SEEDS))))
    draw = np.random.default_rng(3)

    def filled(leaf: Any) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.full(leaf.shape, 5, leaf.dtype)
        # Positive, as variances must be, and of both signs elsewhere after the weights' sums.
        return draw.uniform(0.05, 1.5, leaf.shape).astype(leaf.dtype)

    tree = jax.tree.map(filled, tree)
    centered = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf - 0.75 if "weight" in str(path) or "bias" in str(path) else leaf,
        tree,
    )
    checkpoint.save_checkpoint(folder / "checkpoint", 3000, centered, {})
    spaces = {"obs_size": sizes[0], "action_size": sizes[1]}
    spaces["agents"] = None if layout is None else asdict(layout)
    run = {"status": "finished", "training": training.record(), "devices": 1, "spaces": spaces}
    records.write_json(folder / "run.json", run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            made[name].mkdir()
            write_run(made[name], name)
        return made[name]

    return of


def observations(size: int, rows: int = 64) -> np.ndarray:
    return np.random.default_rng(1).normal(1, 2, (rows, size)).astype(np.float32)


def parts(run: LabRun, values: np.ndarray, kind: str, agent: int) -> np.ndarray:
    ends = np.cumsum(run.spaces["agents"][kind])
    return np.split(values, ends[:-1], axis=1)[agent]


@pytest.mark.parametrize("name", [n for n in RUNS if n != "batch" and "layout" not in RUNS[n][2]])
def test_an_actor_acts_as_in_the_lab(folder, name):
    run, lab = read_run(folder(name)), load.load_run(folder(name))
    obs = observations(OBS)
    expected = load.actions(lab, 5)(obs)
    assert expected.std() > 0.01
    module = export.to_torch(run, 5)
    proof = export.prove(export._act_of(module), module, obs, expected)
    assert proof.tolerance < 1e-3
    assert not module.training
    with pytest.raises(BatchproofError, match="the export differs from the lab by"):
        export.prove(export._act_of(module), module, obs, load.actions(lab, 7)(obs))


@pytest.mark.parametrize("name", ["team", "alone", "shared"])
def test_each_agent_acts_as_in_the_lab(folder, name):
    run, lab = read_run(folder(name)), load.load_run(folder(name))
    obs = observations(lab.obs_size)
    expected = load.actions(lab, 7)(obs)
    for i, agent in enumerate(run.agents):
        own = parts(run, obs, "obs_sizes", i)
        module = export.to_torch(run, 7, agent=agent)
        mine = parts(run, expected, "action_sizes", i)
        export.prove(export._act_of(module), module, own, mine)
    with pytest.raises(BatchproofError, match="name one with --agent: left, right"):
        export.to_torch(run, 7)


@pytest.mark.parametrize("name", ["td3", "sac", "ddpg", "crossq"])
def test_critics_give_the_lab_s_q(folder, name):
    run, lab = read_run(folder(name)), load.load_run(folder(name))
    obs, action = observations(OBS), np.tanh(observations(ACTION))
    state, moments = lab.of_seed(5), lab.moments_of_seed(5)
    seen = obs if moments is None else obs_norm.normalize(moments, obs)
    mlp = lab.training.config.critic
    q, _ = nets.q_values(mlp, state.critic, jnp.asarray(seen), jnp.asarray(action), E)
    with torch.no_grad():
        found = export.critics(run, 5)(torch.from_numpy(obs), torch.from_numpy(action))
    assert len(found) == len(q)
    np.testing.assert_allclose(np.concatenate(found, 1).T, q, rtol=1e-4, atol=1e-4)


def test_a_categorical_critic_gives_its_mean(folder):
    run, lab = read_run(folder("xqc")), load.load_run(folder("xqc"))
    obs, action, config = observations(OBS), np.tanh(observations(ACTION)), lab.training.config
    critic = lab.of_seed(7).target_critic
    logits, _ = nets.critic_outputs(config.critic, critic, jnp.asarray(obs), jnp.asarray(action), E)
    with torch.no_grad():
        found = export.critics(run, 7, target=True)(torch.from_numpy(obs), torch.from_numpy(action))
    expected = xqc.mean_value(config, logits)
    np.testing.assert_allclose(np.concatenate(found, 1).T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["td3", "sac", "ddpg", "xqc", "reinforce"])
def test_folding_leaves_no_norm_and_the_same_actions(folder, name):
    run = read_run(folder(name))
    plain, folded = export.to_torch(run, 5), export.to_torch(run, 5, fold=True)
    assert not any(hasattr(layer, "running_mean") for layer in folded)
    assert any(hasattr(layer, "running_mean") for layer in plain)
    obs = torch.from_numpy(observations(OBS)).double()
    with torch.no_grad():
        gap = (plain.double()(obs) - folded.double()(obs)).abs().max()
    assert gap < 1e-5  # of weights rounded to float32
    with pytest.raises(BatchproofError, match="has no norm with running statistics"):
        export.to_torch(read_run(folder("crossq")), 5, fold=True)


@pytest.mark.parametrize("name", ["td3", "sac", "crossq", "xqc", "shared"])
def test_a_torch_file_comes_back_bit_for_bit_with_its_options(folder, name, tmp_path):
    run, path = read_run(folder(name)), tmp_path / "actor.safetensors"
    agent = run.agents[1] if run.agents else None
    bounds = np.full(1, -2.0), np.full(1, 3.0)
    module = export.to_torch(run, 5, agent=agent, bounds=bounds)
    assert export.write(run, 5, "torch", path, agent=agent, bounds=bounds) is None
    loaded = export.load_torch(path)
    obs = torch.from_numpy(observations(export.obs_size(run, agent)))
    assert torch.equal(loaded(obs), module(obs))
    assert str(loaded) == str(module)  # every layer with its options
    raw = export.to_torch(run, 5, agent=agent)(obs).detach()
    torch.testing.assert_close(loaded(obs).detach(), -2 + 2.5 * (raw + 1))


def test_onnx_acts_as_the_lab_for_any_number_of_rows(folder, tmp_path):
    run, lab = read_run(folder("td3")), load.load_run(folder("td3"))
    path, obs = tmp_path / "actor.onnx", observations(OBS)
    actions = load.actions(lab, 5)(obs)
    proof = export.write(run, 5, "onnx", path, proof=(obs, actions))
    assert proof is not None
    assert proof.error <= proof.tolerance < 1e-3
    act = export.run_onnx(path)
    np.testing.assert_allclose(act(obs[:1]), actions[:1], atol=proof.tolerance)


def test_what_fails_its_proof_is_not_written(folder, tmp_path):
    run = read_run(folder("td3"))
    wrong = observations(OBS), np.zeros((64, 1), np.float32)
    with pytest.raises(BatchproofError, match="not written"):
        export.write(run, 5, "torch", tmp_path / "actor.safetensors", proof=wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sb3-td3", "sb3-sac", "sb3-ddpg"])
def test_an_sb3_model_has_the_lab_s_actions_and_q(folder, name, tmp_path):
    from stable_baselines3 import DDPG, SAC, TD3

    from batchproof.sb3 import from_lab, set_modes

    run, lab = read_run(folder(name)), load.load_run(folder(name))
    obs, action = observations(OBS), np.tanh(observations(ACTION))
    path = tmp_path / "model.zip"
    proof = from_lab.write(run, 5, path, (obs, load.actions(lab, 5)(obs)))
    assert proof is not None
    model = {"td3": TD3, "sac": SAC, "ddpg": DDPG}[run.algo].load(path, device="cpu")
    if name != "sb3-ddpg":
        set_modes(model)  # under the plan that the run had
        assert model.batchproof_modes == str(run.plan)
    model.policy.set_training_mode(False)
    state, config = lab.of_seed(5), lab.training.config
    for ours, theirs in (
        (state.critic, model.policy.critic),
        (state.target_critic, model.policy.critic_target),
    ):
        q, _ = nets.q_values(config.critic, ours, jnp.asarray(obs), jnp.asarray(action), E)
        with torch.no_grad():
            found = theirs(torch.from_numpy(obs), torch.from_numpy(action))
        np.testing.assert_allclose(np.concatenate(found, 1).T, q, rtol=1e-4, atol=1e-4)
    if run.algo == "sac":
        assert model.log_ent_coef.item() == pytest.approx(float(state.log_alpha))
        _, log_std, _ = model.policy.actor.get_action_dist_params(torch.from_numpy(obs))
        output, _ = nets.apply(config.actor, state.actor, jnp.asarray(obs), E)
        expected = np.clip(output[:, ACTION:], -20, 2)
        np.testing.assert_allclose(log_std.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("td3", "no place for normalized observations"),
        ("sac", "no place for norms placed input"),
        ("xqc", "no place for this xqc"),
        ("crossq", "no place for a crossq with norm layer"),
        ("crossq-targets", "no place for a crossq with target networks"),
        ("crossq-blind", r"a crossq under plan TETJJ \(it takes TEEJJ\)"),
        ("skipped", "no place for an actor that acts in mode B"),
    ],
)
def test_sb3_refuses_what_it_has_no_place_for(folder, name, message):
    from batchproof.sb3 import from_lab

    with pytest.raises(BatchproofError, match=message):
        from_lab.to_sb3(read_run(folder(name)), 5)


def test_crossq_becomes_sb3_contrib_s(folder, tmp_path):
    from sb3_contrib import CrossQ

    from batchproof.sb3 import from_lab

    run, lab = read_run(folder("sb3-crossq")), load.load_run(folder("sb3-crossq"))
    obs, action = observations(OBS), np.tanh(observations(ACTION))
    path = tmp_path / "model.zip"
    assert from_lab.write(run, 5, path, (obs, load.actions(lab, 5)(obs))) is not None
    model = CrossQ.load(path, env=gymnasium.make("Pendulum-v1"), device="cpu")
    model.policy.set_training_mode(False)
    state, config = lab.of_seed(5), lab.training.config
    q, _ = nets.q_values(config.critic, state.critic, jnp.asarray(obs), jnp.asarray(action), E)
    with torch.no_grad():
        found = model.critic(torch.from_numpy(obs), torch.from_numpy(action))
    np.testing.assert_allclose(np.concatenate(found, 1).T, q, rtol=1e-4, atol=1e-4)
    _, log_std, _ = model.actor.get_action_dist_params(torch.from_numpy(obs))
    output, _ = nets.apply(config.actor, state.actor, jnp.asarray(obs), E)
    expected = np.clip(output[:, ACTION:], -20, 2)
    np.testing.assert_allclose(log_std.detach(), expected, rtol=1e-4, atol=1e-4)

    assert model.log_ent_coef.item() == pytest.approx(float(state.log_alpha))
    assert model.target_entropy == pytest.approx(-0.5 * ACTION)
    assert model.actor.optimizer.param_groups[0]["betas"] == (0.6, 0.999)
    norm = model.critic.q_networks[0][0]
    assert (norm.momentum, norm.eps, norm.warmup_steps) == (0.02, 2e-3, 99_999)
    assert norm.steps == 5
    before = norm.ra_mean.clone()
    model.learn(120)  # it trains on, past the run's learning_starts of 100
    assert not torch.equal(norm.ra_mean, before)


def test_a_policy_that_acts_by_its_batch_is_audited_and_not_exported(folder):
    run = read_run(folder("batch"))
    with pytest.raises(BatchproofError, match="train with E in slot 0"):
        export.to_torch(run, 5)
    report = rules.audit(export.to_subject(run, 5, observations(OBS)), only=["BP1"])
    assert not report.clean
    healthy = export.to_subject(read_run(folder("sb3-ddpg")), 5, observations(OBS))
    assert rules.audit(healthy, only=["BP1"]).clean


@pytest.mark.parametrize("name", ["td3", "xqc", "team", "alone", "shared"])
def test_a_subject_s_networks_are_the_lab_s(folder, name):
    run, lab = read_run(folder(name)), load.load_run(folder(name))
    obs = observations(lab.obs_size)
    action = load.actions(lab, 5)(obs)
    rewards = np.ones((64, len(run.agents))) if run.agents else np.ones(64)
    transitions = {"obs": obs, "action": action, "reward": rewards, "next_obs": obs}
    transitions["terminated"] = np.zeros(64)
    agent = run.agents[-1] if run.agents else None
    subject = export.to_subject(run, 5, obs, agent=agent, transitions=transitions)
    index = run.agent_index(agent)
    mine = action if index is None else parts(run, action, "action_sizes", index)
    np.testing.assert_allclose(subject.act(subject.obs), mine, atol=1e-4)
    data = subject.transitions
    assert data is not None
    assert subject.critic is not None
    assert subject.critic_actor is not None
    q = subject.critic(data.obs, data.action)
    # The actions were the policy's own, so the critic's actor gives them again.
    np.testing.assert_allclose(subject.critic_actor(data.obs).detach(), data.action, atol=1e-4)
    np.testing.assert_allclose(
        q.detach(), subject.critic(data.obs, subject.critic_actor(data.obs)).detach(), atol=1e-2
    )
    if name == "xqc":
        scale = xqc.reward_scale(lab.training.config, lab.of_seed(5))
        np.testing.assert_allclose(data.reward, 1 / np.asarray(scale), rtol=1e-6)
    else:
        assert data.reward.eq(1).all()


@pytest.mark.parametrize(
    ("name", "blind", "target", "joint"),
    [
        ("sb3-td3", "fail", "pass", "not_applicable"),  # TETTE
        ("seeing", "pass", "pass", "not_applicable"),  # TEETE
        ("ma-bn", "pass", "review", "not_applicable"),  # TTETT
        ("joint", "pass", "not_applicable", "pass"),  # TEEJJ, as CrossQ trains
        ("apart", "pass", "not_applicable", "fail"),  # TEETE without a target network
    ],
)
def test_an_audit_of_a_run_goes_by_the_plan_that_it_trained_under(
    folder, name, blind, target, joint
):
    run = read_run(folder(name))
    obs = observations(OBS)
    action = np.random.default_rng(2).uniform(-1, 1, (64, ACTION)).astype(np.float32)
    transitions = {"obs": obs, "action": action, "reward": np.linspace(0, 1, 64), "next_obs": obs}
    transitions["terminated"] = np.zeros(64)
    subject = export.to_subject(run, 5, obs, transitions=transitions)
    found = rules.audit(subject, only=["BP303", "BP304", "BP307"]).outcomes
    statuses = [str(found[code].status.value) for code in ("BP304", "BP303", "BP307")]
    assert statuses == [blind, target, joint]
    if blind == "fail":
        assert "train it with the mode plan TEETE" in found["BP304"].findings[0].message


def test_damaged_runs_and_files_are_refused(folder, tmp_path):
    with pytest.raises(BatchproofError, match="name the folder of a `batchproof train` run"):
        read_run(tmp_path)
    write_run(tmp_path, "sb3-td3")
    (arrays,) = (tmp_path / "checkpoint").glob("*.safetensors")
    arrays.write_bytes(arrays.read_bytes()[:-8])
    with pytest.raises(BatchproofError, match="its checksum differs"):
        read_run(tmp_path)
    with pytest.raises(BatchproofError, match="seed 0 was not trained in this run: it has 7, 5"):
        export.to_torch(read_run(folder("td3")), 0)
    (tmp_path / "actor.safetensors").write_bytes(b"nothing")
    with pytest.raises(BatchproofError, match="not a safetensors file"):
        export.load_torch(tmp_path / "actor.safetensors")


def every_change(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where JSON objects and lists below ``value`` hold something, and what may stand there."""
    held = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in held:
        yield from ((*at, key, new) for new in (DROPPED, None, [], "x"))
        if isinstance(item, dict | list):
            yield from every_change(item, (*at, key))


def changed(record: Any, *at: Any) -> Any:
    """A copy of a record with one thing in it dropped, or replaced by another."""
    record = copy.deepcopy(record)
    *path, key, new = at
    part = record
    for name in path:
        part = part[name]
    if new is DROPPED:
        del part[key]
    else:
        part[key] = new
    return record


def put(run: Path, record: Any) -> None:
    (run / "run.json").write_text(json.dumps(record))  # without a checksum, as versions before


@pytest.mark.parametrize(("name", "below"), [("sb3-td3", ()), ("team", ("spaces",))])
def test_a_record_that_was_changed_gives_no_traceback(name, below, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, team = Path("run"), RUNS[name][2].get("layout")
    run.mkdir()
    write_run(run, name)
    rows = {"seed": list(SEEDS), "step": [10, 10], "return": [1.0, 2.0]}
    records.write_columns(run / "metrics.parquet", rows)
    obs, agent = observations(7 if team else OBS, 4), "left" if team else None
    whole = records.read_json(run / "run.json") | {"command": "batchproof", "wall_s": 1.0}
    refused = []

    def tried(do: Any) -> None:
        try:
            do()
        except BatchproofError as error:
            refused.append(str(error))

    def exported() -> None:
        lab = read_run(run)
        seed = lab.training["seeds"][0]
        limits = export.env_bounds(lab, seed) if agent is None else None
        export.write(lab, seed, "torch", Path("a.safetensors"), agent=agent, bounds=limits)

    def examined() -> None:
        lab = read_run(run)
        subject = export.to_subject(lab, lab.training["seeds"][0], obs, agent=agent)
        assert subject.policy(subject.obs).isfinite().all()

    def reported() -> None:
        assert data.read([run])

    for do in (exported, examined, reported):
        put(run, whole)
        do()
    part = reduce(getitem, below, whole)
    for at in every_change(part, below):
        put(run, changed(whole, *at))
        for do in (exported, examined, reported, lambda: load.load_run(run)):
            tried(do)
    assert len(refused) > 100
    assert not any("\n" in line for line in refused)
    assert sum("run.json: not the record of a run of this version" in line for line in refused) > (
        0.8 * len(refused)
    )


@pytest.mark.parametrize(
    ("at", "part"),
    [
        (("training", "seeds", []), "seeds is empty"),
        (("training", "seeds", [7, 5, 3]), "3 seeds, and fewer in the checkpoint"),
        (("training", "config", "actor", "norm", "eps", DROPPED), "it has no eps"),
        (("training", "config", "actor", "hidden", [8]), "hidden layers of the actor that"),
        (("training", "config", "plan", "TEXTE"), "unknown mode plan 'TEXTE'"),
        (("training", "normalize_obs", True), "no statistics for it"),
        (("training", "algo", "ppo"), "unknown algorithm ppo"),
        (("training", "env_options", [{}]), "env_options has 1 entries for 2 seeds"),
        (("spaces", "obs_size", "3"), "obs_size is not a whole number"),
        (("spaces", "obs_size", OBS + 2), "sizes of observations or actions that the checkpoint"),
        (("spaces", "action_size", 7), "sizes of observations or actions that the checkpoint"),
        (("devices", 0), "devices is not a positive whole number"),
    ],
)
def test_what_is_wrong_with_a_record_is_told_by_every_command(at, part, tmp_path, say):
    write_run(tmp_path, "sb3-td3")
    np.save(tmp_path / "obs.npy", observations(OBS))
    put(tmp_path, changed(records.read_json(tmp_path / "run.json"), *at))
    torch_file = ("--format", "torch", "-o", tmp_path / "a.safetensors", "--no-proof")
    for words in (("export", tmp_path, *torch_file), ("audit", tmp_path)):
        code, out, err = say(*words, *(["--obs", tmp_path / "obs.npy"] * (words[0] == "audit")))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{tmp_path / 'run.json'}: not the record of a run of this version" in err
        assert part in err
    assert not (tmp_path / "a.safetensors").exists()


def test_the_settings_that_a_record_may_hold_are_the_library_s():
    assert tuple(AGENTS) == export.ALGORITHMS
    kinds = {"str": "text", "Plan": "text", "int": "a whole number", "bool": "true or false"}
    kinds |= {"float": "a number", "tuple[int, ...]": "a list of whole numbers"}
    kinds |= {"MLP": "an object", "Norm": "an object"}
    for kind in (Training, MLP, Norm, *(agent.Config for agent in AGENTS.values())):
        for field in fields(kind):
            if field.type == "Any" or not field.metadata.get("record", True):
                continue
            name, _, null = field.type.partition(" | ")
            assert run_record.FORMS[field.name][1].startswith(kinds[name]), field.name
            assert not null or field.name in run_record.OR_NULL


# --- command line ------------------------------------------------------------------------------


@pytest.fixture
def say(capsys):
    def run(*words: Any) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_command_exports_with_a_proof_on_the_run_s_environment(folder, tmp_path, say):
    path = tmp_path / "actor.safetensors"
    code, out, _ = say("export", folder("sb3-td3"), "--format", "torch", "-o", path)
    assert code == 0
    assert "seed 7, at step 3000; actions in the environment's units" in out
    assert "proof: max |export - lab| = " in out
    assert "on 1000 observations" in out
    scale: Any = export.load_torch(path)[-1]
    assert (float(scale.low), float(scale.high)) == (-2, 2)


def test_the_command_takes_observations_or_no_proof(folder, tmp_path, say):
    np.save(tmp_path / "obs.npy", observations(7))
    path = tmp_path / "a.safetensors"
    words = ("export", folder("team"), "--agent", "far", "--format", "torch", "--unscaled")
    code, out, _ = say(*words, "--obs", tmp_path / "obs.npy", "-o", path)
    assert code == 0
    assert "on 64 observations" in out
    code, out, _ = say(*words, "--no-proof", "-o", path)
    assert (code, out.splitlines()[-1]) == (0, "no proof was made")
    code, _, err = say(*words, "--no-proof", "-o", tmp_path / "a.onnx")
    assert code == 2
    assert "--format torch writes a .safetensors file" in err


def test_without_a_proof_jax_is_not_needed(folder, tmp_path):
    path = tmp_path / "actor.safetensors"
    words = ["export", str(folder("sb3-td3")), "--format", "torch", "-o", str(path), "--no-proof"]
    code = "import sys; sys.modules['jax'] = None\nfrom batchproof import cli\n"
    done = subprocess.run([sys.executable, "-c", f"{code}sys.exit(cli.main({words!r}))"])
    assert done.returncode == 0
    assert path.exists()


def test_an_export_never_takes_the_place_of_a_run_s_own_files(folder, tmp_path, say):
    run = tmp_path / "run"
    shutil.copytree(folder("sb3-td3"), run)
    (arrays,) = (run / "checkpoint").glob("*.safetensors")
    (tmp_path / "elsewhere").symlink_to(run / "checkpoint")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ("export", run, "--format", "torch", "--no-proof")
    for out in (arrays, tmp_path / "elsewhere" / "new.safetensors"):
        code, _, err = say(*words, "-o", out)
        assert (code, err.count("\n")) == (2, 1)
        assert "would take the place of a run's own record" in err
    (tmp_path / "folder.safetensors").mkdir()
    code, _, err = say(*words, "-o", tmp_path / "folder.safetensors")
    assert code == 2
    assert "is a folder: name a file" in err
    for name in ("run.json", "metrics.parquet"):
        code, _, err = say("trace", run, "--output", run / name)
        assert code == 2
        assert "a run's own record" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    mine = tmp_path / "checkpoint"  # a folder of that name that is no run's
    mine.mkdir()
    assert say(*words, "-o", mine / "actor.safetensors")[0] == 0


@pytest.mark.parametrize("name", ["sb3-td3", "team"])
def test_transitions_of_the_replay_are_those_that_were_stored(folder, name):
    run = read_run(folder(name))
    assert run.replayed(5, 64) is None  # made before runs kept a sample
    obs, action = run.spaces["obs_size"], run.spaces["action_size"]
    rewards = len(run.agents) or 1
    draw = np.random.default_rng(0)
    rows = replay.init(100, obs, action, rewards)
    stored = []
    for step in range(100):
        sizes = (obs, action, rewards, obs)
        one = [draw.normal(size=size).astype(np.float32) for size in sizes]
        one = [*one, draw.random() < 0.5]
        stored.append(one)
        rows = replay.insert(rows, step, *(jnp.asarray(part) for part in one))
    held = np.stack([np.zeros_like(rows), np.asarray(rows)])  # SEEDS are (7, 5)
    found = replace(run, arrays=run.arrays | {"rows": held}).replayed(5, 64)
    order = [int(np.flatnonzero((np.stack([s[0] for s in stored]) == o).all(1))[0])
             for o in found["obs"]]  # fmt: skip
    assert len(set(order)) == len(order) == 64
    assert max(order[:8]) > 32  # the first rows are not the oldest
    for i, at in enumerate(order):
        for key, part in zip(("obs", "action", "reward", "next_obs"), stored[at], strict=False):
            np.testing.assert_array_equal(
                found[key][i], part if key != "reward" else part.squeeze()
            )
        assert found["terminated"][i] == stored[at][4]
    wrong = replace(run, arrays=run.arrays | {"rows": held[..., 1:]})
    with pytest.raises(BatchproofError, match="sizes that the replay has not"):
        wrong.replayed(5, 64)


def test_a_run_is_audited_on_its_replay(tmp_path, say, monkeypatch):
    """A running one on all of it, a finished one on a sample; BP402 is about no other data."""
    config = td3.Config(actor=net("batch"), critic=net("batch"), batch_size=8)
    training = Training("td3", config, "Pendulum-v1", seeds=SEEDS, steps=1100, learning_starts=1000)
    stepper = off_policy.Stepper(training)
    stepper.advance(1100)
    stepper.save_agents(tmp_path / "checkpoint")
    spaces = {"obs_size": OBS, "action_size": ACTION, "agents": None}
    run = {"status": "finished", "training": training.record(), "devices": 1, "spaces": spaces}
    records.write_json(tmp_path / "run.json", run)
    kept = read_run(tmp_path).arrays["rows"]
    whole = np.asarray(stepper.seed.rows)
    assert kept.shape == (len(whole), 1024, whole.shape[2])
    assert all({row.tobytes() for row in a} <= {row.tobytes() for row in b}
               for a, b in zip(kept, whole, strict=True))  # fmt: skip
    assert load.load_run(tmp_path).step == 1100
    monkeypatch.setattr(load, "collect", None)  # no environment is stepped
    code, out, _ = say("audit", tmp_path, "--only", "BP402,BP305", "--format", "json")
    assert code in (0, 1)
    outcomes = {one["code"]: one for one in json.loads(out)["rules"]}
    assert "skipped" not in {one["status"] for one in outcomes.values()}
    monkeypatch.undo()
    code, out, _ = say(
        "audit", tmp_path, "--only", "BP402", "--format", "json", "--env", "Pendulum-v1"
    )
    (outcome,) = json.loads(out)["rules"]
    assert outcome["status"] in ("skipped", "fail")


def test_trace_and_audit_take_a_run_s_folder(folder, tmp_path, say):
    code, out, _ = say("trace", folder("sb3-td3"), "--format", "json")
    assert code == 0
    assert json.loads(out)["plan"] == "TETTE"
    say = partial(say, "audit", folder("sb3-td3"))
    code, out, _ = say("--only", "BP301,BP304", "--format", "json", "--seed", "5")
    assert code in (0, 1)
    assert "critic.after.0.norm_pre_0" in out
    code, _, err = say("--agent", "left")
    assert code == 2
    assert "this run has one agent" in err
