"""Runs of the lab as Stable-Baselines3 models: actor, critics and targets, where the shapes agree.

They agree for TD3, DDPG and SAC with norms before the activation, or none: the policies of
`batchproof.sb3.policies` hold the same layers. And for CrossQ as sb3-contrib has it. What is not
carried over: the optimizers' moments and the replay buffer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from sb3_contrib import CrossQ
from sb3_contrib.common import torch_layers as sb3_contrib_layers
from stable_baselines3 import DDPG, SAC, TD3
from torch import nn

from batchproof import export
from batchproof.errors import BatchproofError
from batchproof.export import LabRun
from batchproof.layers.batch_renorm import BatchRenorm1d
from batchproof.layers.convert import to_state
from batchproof.modes import PRESETS, Plan
from batchproof.sb3.modes import set_modes
from batchproof.sb3.policies import NormSACPolicy, NormTD3Policy

ALGORITHMS: dict[str, tuple[Any, Any]] = {
    "td3": (TD3, NormTD3Policy),
    "ddpg": (DDPG, NormTD3Policy),
    "sac": (SAC, NormSACPolicy),
    "crossq": (CrossQ, "MlpPolicy"),
}
"""The library's algorithm and policy by the lab's name."""


def to_sb3(run: LabRun, seed: int) -> Any:
    """A Stable-Baselines3 model that acts as the lab's agent does, with its critics and targets.

    The model keeps the run's plan: `batchproof.sb3.set_modes` after loading trains on under it.

    Args:
        run: from `batchproof.export.read_run`.
        seed: one of the run's.

    Raises:
        BatchproofError: an algorithm or a network that the library has no place for, or an
            environment that is not installed.
    """
    _check(run)
    algorithm, policy = ALGORITHMS[run.algo]
    config, record = run.config, run.training
    networks = {name: config[name] for name in ("actor", "critic")}
    keywords: dict[str, Any] = {
        "net_arch": {
            "pi": list(networks["actor"]["hidden"]),
            "qf": list(networks["critic"]["hidden"]),
        },
    }
    if run.algo != "ddpg":  # which has one critic whatever is asked for
        keywords["n_critics"] = config["critics"]
    more: dict[str, Any] = {}
    if run.algo == "crossq":
        norm = networks["actor"]["norm"]
        keywords["batch_norm_momentum"] = norm["momentum"]
        keywords["batch_norm_eps"] = norm["eps"]
        keywords["renorm_warmup_steps"] = norm["warmup_steps"] - 1  # theirs ends one step later
        keywords["optimizer_kwargs"] = {"betas": (config["adam_b1"], 0.999)}
        more["policy_delay"] = config["policy_delay"]
        more["ent_coef"] = f"auto_{config['initial_alpha']}"
        more["target_entropy"] = config["entropy_per_dimension"] * run.spaces["action_size"]
    else:
        used = [net["norm"] for net in networks.values() if net["norm"]["kind"] != "none"]
        keywords |= {f"{name}_norm": net["norm"]["kind"] for name, net in networks.items()}
        keywords["norm_options"] = export.norm_options(used[0]) if used else None
        more["tau"] = config["tau"]
    if run.algo == "td3":
        more["policy_delay"] = config["policy_delay"]
        more["target_policy_noise"] = config["target_noise"]
        more["target_noise_clip"] = config["noise_clip"]
    model = algorithm(
        policy,
        export.make_env(run, seed),
        policy_kwargs=keywords,
        learning_rate=config["learning_rate"],
        gamma=config["gamma"],
        batch_size=config["batch_size"],
        learning_starts=record["learning_starts"],
        buffer_size=min(record["buffer_size"], record["steps"]),
        device="cpu",
        **more,
    )
    held, targets = model.policy, config["target_network"]
    _copy_actor(held.actor, export.actor_layers(run, seed))
    _copy_critics(held.critic, export.critics(run, seed))
    if run.algo != "crossq":
        _copy_critics(held.critic_target, export.critics(run, seed, target=targets))
    if run.algo in ("sac", "crossq"):
        model.log_ent_coef.data.fill_(float(run.of(seed, "agent")["log_alpha"]))
    else:
        role = "target_actor" if targets else "actor"
        _copy_actor(held.actor_target, export.actor_layers(run, seed, role))
    held.set_training_mode(False)
    kinds = {net["norm"]["kind"] for net in networks.values()}
    if run.algo != "crossq" and kinds & {"batch", "renorm"}:
        set_modes(model, run.plan)
    return model


def write(
    run: LabRun, seed: int, path: Path, proof: tuple[np.ndarray, np.ndarray] | None = None
) -> export.Proof | None:
    """Save `to_sb3`'s model, proven on the file itself as `batchproof.export.write` does.

    Raises:
        BatchproofError: as `to_sb3` and `batchproof.export.prove`; nothing is written then.
    """
    model = to_sb3(run, seed)
    done = None
    with export.replacing(path) as temporary:
        with open(temporary, "wb") as file:
            model.save(file)
        if proof is not None:
            space = model.action_space
            bounds = space.low.reshape(-1), space.high.reshape(-1)
            # This process wrote the file a moment ago, so reading it back trusts nobody new.
            with open(temporary, "rb") as written:
                loaded = type(model).load(written, device="cpu")

            def act(obs: np.ndarray) -> np.ndarray:
                shaped = obs.reshape(-1, *model.observation_space.shape)
                return loaded.predict(shaped, deterministic=True)[0].reshape(len(obs), -1)

            module = export.to_torch(run, seed, bounds=bounds)
            done = export.prove(act, module, proof[0], proof[1], bounds)
    return done


def _check(run: LabRun) -> None:
    """Raise a `BatchproofError` for what the library's policies have no place for."""

    def refuse(why: str) -> NoReturn:
        raise BatchproofError(
            f"{run.folder}: Stable-Baselines3 has no place for {why}: use --format torch or onnx"
        )

    if run.algo not in ALGORITHMS:
        refuse(f"this {run.algo} (it takes {', '.join(ALGORITHMS)})")
    if run.training["normalize_obs"]:
        refuse("normalized observations within a model")
    if export.acting_letter(run) != "E":
        refuse(f"an actor that acts in mode {export.acting_letter(run)}")
    crossq = run.algo == "crossq"
    placement = "input+post" if crossq else "pre"
    networks = [run.config[name] for name in ("actor", "critic")]
    for net in networks:
        norm = net["norm"]
        if crossq and norm["kind"] != "renorm":
            refuse(f"a crossq with norm {norm['kind']} (it takes renorm)")
        late = "before-action" in norm["placement"].split("+")  # moves the action, norm or not
        if late or (norm["kind"] != "none" and norm["placement"] != placement):
            refuse(f"norms placed {norm['placement']} (it takes {placement})")
        if not net["bias"]:
            refuse("hidden layers without a bias")
    used = [net["norm"] for net in networks if net["norm"]["kind"] != "none"]
    if len(used) == 2 and used[0] != used[1]:
        refuse("two different norms in actor and critic")
    if crossq and run.config["target_network"]:
        refuse("a crossq with target networks")
    if crossq and run.plan != Plan.parse("crossq"):
        refuse(f"a crossq under plan {run.plan} (it takes {PRESETS['crossq']})")


def _copy_actor(actor: Any, layers: list[nn.Module]) -> None:
    if hasattr(actor, "latent_pi"):
        _copy(actor.latent_pi, layers[:-1])
        # One output layer in the lab, mean above log std; two in the library.
        last: Any = layers[-1]
        weight, bias = last.weight.data.chunk(2), last.bias.data.chunk(2)
        for i, head in enumerate((actor.mu, actor.log_std)):
            head.load_state_dict({"weight": weight[i], "bias": bias[i]})
    else:
        _copy(actor.mu, [*layers, nn.Tanh()])


def _copy_critics(into: Any, critics: export.Critics) -> None:
    for net, layers in zip(into.q_networks, critics.after, strict=True):
        _copy(net, list(layers.children()))


def _copy(into: Iterable[nn.Module], layers: list[nn.Module]) -> None:
    for mine, theirs in zip(into, layers, strict=True):
        if isinstance(mine, sb3_contrib_layers.BatchRenorm):
            mine.load_state_dict(_contrib_state(theirs))
            continue
        assert type(mine) is type(theirs), f"{type(mine).__name__}, {type(theirs).__name__}"
        mine.load_state_dict(theirs.state_dict())


def _contrib_state(layer: Any) -> dict[str, Any]:
    """sb3-contrib's state of a Batch Renorm; how a batch's variance is taken is not part of it."""
    assert isinstance(layer, BatchRenorm1d)
    layer.batch_variance = layer.running_variance = "unbiased"
    return to_state(layer, "sb3-contrib")
