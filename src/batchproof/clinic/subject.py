"""What is examined: networks, the function that acts, observations, and the way back.

Shapes: ``N`` observations, ``B`` rows of one batch, ``A`` action, ``C`` critics.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchproof.errors import BatchproofError

Obs = Tensor | dict[str, Tensor]
"""A batch of observations: one tensor (B, ...), or one for each key of a Dict space."""


@dataclass(frozen=True)
class Transitions:
    """Replayed transitions, as the networks take them.

    Attributes:
        obs: (B, ...).
        action: (B, A), scaled as the critic takes it; (B,) integers where actions are discrete.
        reward: (B,).
        next_obs: (B, ...).
        terminated: (B,), 1 where the episode truly ended.
    """

    obs: Obs
    action: Tensor
    reward: Tensor
    next_obs: Obs
    terminated: Tensor

    def __len__(self) -> int:
        return len(self.reward)


@dataclass
class Subject:
    """A policy under examination. An audit hands it back bit for bit as it was.

    Attributes:
        name: what reports call it.
        networks: every network by role: ``policy``, or ``actor``, ``critic``, ``actor_target``,
            ``critic_target``, ``q_net``, ``q_net_target``...
        obs: observations (N, ...) to examine it on.
        act: the deterministic action (B, A) as deployed, by the library's own way in. It may
            switch modes.
        policy: the same output (B, K) by the networks in whatever mode they are, differentiable:
            actions in environment units, or logits or Q-values where actions are discrete.
        discrete: whether the action is the argmax of ``policy``.
        targets: each target network's online network, by role.
        critic: Q (C, B) of the online critics on observations and actions, in whatever mode they
            are, differentiable; None where there is none.
        target_critic: the same for the target critics.
        critic_actor: the actor's differentiable action (B, A), scaled as the critics take it.
        target_actor: the same by the target actor; None where the actor itself is asked.
        transitions: replayed transitions; None where there are none.
        collected: whether observations or transitions are of steps that the policy has just made,
            not of what it was trained on.
        action_low: (A,) bounds in environment units; None where unknown or discrete.
        action_high: (A,).
        gamma: discount per step.
        momentum_horizon: gradient steps between two uses of the running statistics, where known.
        update: one real gradient update of the library, for `trace`; None where there is none.
        plan: the mode plan that somebody chose for its updates, None where nobody did. Where there
            is an update, it is what the rules go by; the plan says only what is meant.
        model: the library's own object; None for plain modules.
        normalizers: observation and reward normalizers by name, in training (``train``) and at
            evaluation (``eval``), where known.
    """

    name: str
    networks: dict[str, nn.Module]
    obs: Obs
    act: Callable[[Obs], Tensor]
    policy: Callable[[Obs], Tensor]
    discrete: bool = False
    targets: dict[str, str] = field(default_factory=dict)
    critic: Callable[[Obs, Tensor], Tensor] | None = None
    target_critic: Callable[[Obs, Tensor], Tensor] | None = None
    critic_actor: Callable[[Obs], Tensor] | None = None
    target_actor: Callable[[Obs], Tensor] | None = None
    transitions: Transitions | None = None
    collected: bool = False
    action_low: Tensor | None = None
    action_high: Tensor | None = None
    gamma: float = 0.99
    momentum_horizon: int | None = None
    update: Callable[[], Any] | None = None
    plan: Callable[[], str | None] | None = None
    model: Any = None
    normalizers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rows(self.name, self.obs)
        _check_eager(self.name, self.networks)
        if rows(self.obs) < 2:
            raise BatchproofError(
                f"{self.name}: an audit compares rows, so it needs at least 2 observations, "
                f"got {rows(self.obs)}"
            )
        for part in tensors(self.obs):
            if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                raise BatchproofError(
                    f"{self.name}: the observations hold NaN or infinity: clean them, "
                    "or collect them again"
                )

    @property
    def lacks_replay(self) -> bool:
        """Whether it was trained on a replay (it has critics of actions) that is not here.

        Its running statistics are those of the replay. The states that the present policy visits
        have others, and under those a policy that worked may not: see docs/estimators.md.
        """
        return self.collected and self.critic is not None

    @classmethod
    def from_module(
        cls, module: nn.Module, obs: Obs, *, name: str = "policy", **more: Any
    ) -> Subject:
        """A plain module that maps observations (B, ...) to actions, logits or Q-values (B, K).

        Args:
            module: examined in the modes in which it is handed over: that is how it is deployed.
            obs: (N, ...); floating ones are cast to the type of the module's parameters.
            name: what reports call it.
            more: other attributes of `Subject`.
        """
        return cls(
            name=name,
            networks={"policy": module},
            obs=as_parameters(obs, module),
            act=lambda batch: output_of(module(batch)).detach(),
            policy=lambda batch: output_of(module(batch)),
            **more,
        )

    @classmethod
    def from_callable(
        cls,
        function: Callable[[Obs], Tensor],
        obs: Obs,
        *,
        networks: Mapping[str, nn.Module] | None = None,
        name: str = "policy",
        **more: Any,
    ) -> Subject:
        """Any function with a batch axis; name its ``networks`` so that layers can be blamed."""
        if not callable(function):
            raise BatchproofError(
                f"a {type(function).__name__} is no policy: give a torch module, a function, a "
                "Stable-Baselines3 model (from a file: its class's load) or a Subject"
            )
        return cls(
            name=name,
            networks=dict(networks or {}),
            obs=obs,
            act=lambda batch: output_of(function(batch)).detach(),
            policy=lambda batch: output_of(function(batch)),
            **more,
        )

    @classmethod
    def from_networks(
        cls,
        networks: Mapping[str, nn.Module],
        obs: Obs,
        *,
        targets: Mapping[str, str] | None = None,
        name: str = "policy",
        **more: Any,
    ) -> Subject:
        """Several named networks: ``actor`` maps obs to the action, ``critic`` (obs, action) to Q.

        Args:
            networks: by role; ``actor`` or ``policy`` must be there. A critic takes
                ``(obs, action)`` and gives Q as (B, 1), (B,) or a tuple of such.
            obs: (N, ...).
            targets: each target network's online network, by role.
            name: what reports call it.
            more: other attributes of `Subject`, ``transitions`` above all.
        """
        roles = dict(networks)
        acting = roles.get("actor", roles.get("policy"))
        if acting is None:
            raise BatchproofError(
                f"{name}: name the network that acts 'actor' or 'policy', got {', '.join(roles)}"
            )
        missing = {n for pair in (targets or {}).items() for n in pair if n not in roles}
        if missing:
            raise BatchproofError(
                f"{name}: targets name networks that are not there: {', '.join(sorted(missing))}"
            )

        def q_of(role: str) -> Callable[[Obs, Tensor], Tensor] | None:
            network = roles.get(role)
            if network is None:
                return None
            return lambda batch, action: stacked_q(network(batch, action))

        def actor_of(role: str) -> Callable[[Obs], Tensor] | None:
            network = roles.get(role)
            return None if network is None else lambda batch: output_of(network(batch))

        given: dict[str, Any] = {
            "critic": q_of("critic"),
            "target_critic": q_of("critic_target"),
            "critic_actor": actor_of("actor"),
            "target_actor": actor_of("actor_target"),
            "act": lambda batch: output_of(acting(batch)).detach(),
            "policy": lambda batch: output_of(acting(batch)),
        }
        return cls(
            name=name,
            networks=roles,
            obs=obs,
            targets=dict(targets or {}),
            **(given | more),
        )

    def modules(self) -> Iterator[tuple[str, str, nn.Module]]:
        """Role, path and module of every module, each once; targets have their own roles."""
        seen: set[int] = set()
        for role, network in self.networks.items():
            for path, module in network.named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield role, path, module


def _check_rows(name: str, obs: Any) -> None:
    """Refuse observations that are no tensors with one and the same number of rows."""
    parts = obs if isinstance(obs, dict) else {"": obs}
    for key, part in parts.items():
        where = f" for {key}" if key else ""
        if not isinstance(part, Tensor):
            raise BatchproofError(
                f"{name}: observations are torch tensors, got a {type(part).__name__}{where}: "
                "write torch.as_tensor(...)"
            )
        if part.ndim == 0:
            raise BatchproofError(
                f"{name}: observations need a batch axis (N, ...), got a single number{where}"
            )
    if len({len(part) for part in parts.values()}) != 1:
        counts = ", ".join(f"{key} {len(part)}" for key, part in parts.items())
        raise BatchproofError(
            f"{name}: the keys of the observations need equally many rows, got {counts or 'none'}"
        )


def _check_eager(name: str, networks: Mapping[str, nn.Module]) -> None:
    """Refuse compiled modules, whose layers cannot be hooked, run alone or put back."""
    for role, network in networks.items():
        if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
            raise BatchproofError(
                f"{name}: its {role} network is TorchScript, into whose layers nothing can look: "
                "audit the module that it was made from"
            )


def as_parameters(obs: Obs, *networks: nn.Module) -> Obs:
    """Floating observations in the type of the networks' first floating parameter."""
    floating = (p.dtype for n in networks for p in n.parameters() if p.is_floating_point())
    kind = next(floating, None)

    def cast(part: Any) -> Any:
        known = kind is not None and isinstance(part, Tensor) and part.is_floating_point()
        return part.to(kind) if known else part

    return {key: cast(part) for key, part in obs.items()} if isinstance(obs, dict) else cast(obs)


def sound_weights(*networks: nn.Module) -> bool:
    """Whether all parameters are finite and no buffer is NaN or a running variance below 0.

    Infinite buffers may be masks.
    """
    buffers = [(k, b) for n in networks for k, b in n.named_buffers() if b.is_floating_point()]
    return finite_parameters(*networks) and not any(
        bool(torch.isnan(b).any()) or (name.endswith("_var") and bool((b < 0).any()))
        for name, b in buffers
    )


def finite_parameters(*networks: nn.Module) -> bool:
    """Whether no parameter is NaN or infinite."""
    held = (p for n in networks for p in n.parameters() if p.is_floating_point())
    return all(bool(torch.isfinite(p).all()) for p in held)


def check_runs(subject: Subject, *, sick: bool = False) -> None:
    """Try the policy on two of the observations.

    Args:
        subject: handed back as it was.
        sick: let one through that refuses them because its weights are not finite, as torch's
            distributions do: an audit has a rule that says so, BP404.

    Raises:
        BatchproofError: it cannot take the observations at all, or gives no row for each.
    """
    batch = take(subject.obs, slice(0, 2))
    for run in (subject.policy, subject.act):
        try:
            with unchanged(subject), torch.no_grad():
                output = run(batch)
        except BatchproofError:
            raise
        except Exception as error:
            if not sound_weights(*subject.networks.values()):
                if sick:
                    return
                raise BatchproofError(
                    f"{subject.name} cannot act, for its weights are not finite: `batchproof audit "
                    "--only BP404` says which"
                ) from error
            shapes = ", ".join(str(tuple(part.shape)) for part in tensors(subject.obs))
            line = " ".join(str(error).split())[:300]
            raise BatchproofError(
                f"{subject.name} cannot take these observations, {shapes}: "
                f"{type(error).__name__}: {line}"
            ) from error
        count = len(output) if isinstance(output, Tensor) and output.ndim else 0
        if count != 2:
            raise BatchproofError(
                f"{subject.name} gives {count} rows for 2 observations: wrap it so that it gives "
                "one for each, (B, K)"
            )


def output_of(value: Any) -> Tensor:
    """The tensor (B, K) that a network means: the first of a tuple; a vector becomes (B, 1)."""
    while isinstance(value, tuple | list):
        value = value[0]
    if not isinstance(value, Tensor):
        raise BatchproofError(
            f"the policy gave a {type(value).__name__}: wrap it so that it gives a tensor (B, K)"
        )
    return value[:, None] if value.ndim == 1 else value.flatten(1) if value.ndim > 1 else value


def stacked_q(value: Any) -> Tensor:
    """Q of every critic, (C, B), from a tensor (B, 1) or (B,) or a tuple of them."""
    parts = value if isinstance(value, tuple | list) else (value,)
    return torch.stack([part.reshape(len(part), -1)[:, 0] for part in parts])


def tensors(obs: Obs) -> list[Tensor]:
    """The tensors of a batch of observations."""
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def rows(obs: Obs) -> int:
    """Number of observations."""
    return len(tensors(obs)[0])


def take(obs: Obs, index: Any) -> Obs:
    """Rows of a batch of observations; an integer keeps the batch axis."""
    if isinstance(index, int):
        index = slice(index, index + 1)
    if isinstance(obs, dict):
        return {key: part[index] for key, part in obs.items()}
    return obs[index]


def join(*parts: Obs) -> Obs:
    """Batches of observations one after the other."""
    if isinstance(parts[0], dict):
        return {key: torch.cat([p[key] for p in parts]) for key in parts[0]}  # type: ignore[index]
    return torch.cat(list(parts))  # type: ignore[arg-type]


def fingerprint(subject: Subject) -> str:
    """SHA-256 of all that an audit must not change: weights, buffers, gradients, modes, RNG."""
    digest = hashlib.sha256()
    for role, path, module in subject.modules():
        digest.update(f"{role}/{path}/{module.training}".encode())
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, value in named:
            digest.update(
                f"{key}/{value.dtype}/{tuple(value.shape)}/{value.requires_grad}".encode()
            )
            digest.update(_bytes(value))
            if value.grad is not None:
                digest.update(_bytes(value.grad))
    digest.update(_bytes(torch.get_rng_state()))
    digest.update(repr(np.random.get_state()).encode())
    digest.update(repr(random.getstate()).encode())
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def unchanged(subject: Subject, *, parameters: bool = True) -> Iterator[None]:
    """Hand the subject back bit for bit as it was, also after an exception or Ctrl-C.

    Parameters, buffers (also those added or replaced inside), gradients, gradient flags, modes,
    tensors, arrays and numbers that modules keep as plain attributes, and the random state of
    torch, NumPy and Python.

    Args:
        subject: what is examined.
        parameters: whether parameters and gradients are put back too; a forward pass alone changes
            none, and leaving them out is many times faster.
    """
    kinds = ("_parameters", "_buffers") if parameters else ("_buffers",)
    saved = [_Saved(module, kinds) for _, _, module in subject.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    python_state, grad_enabled = random.getstate(), torch.is_grad_enabled()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for module in saved:
            module.restore()
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_grad_enabled(grad_enabled)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


class _Saved:
    """One module's own state, and the way back to it, into the very same tensors."""

    def __init__(self, module: nn.Module, kinds: tuple[str, ...]) -> None:
        self.module = module
        self.training = module.training
        self.held = {kind: dict(getattr(module, kind)) for kind in ("_parameters", "_buffers")}
        self.tensors = {
            kind: {
                key: (value, value.detach().clone(), value.requires_grad, _clone(value.grad))
                for key, value in getattr(module, kind).items()
                if value is not None
            }
            for kind in kinds
        }
        # Home-made normalizers often keep their statistics in attributes that are no buffers.
        self.plain = {
            key: (value, value.detach().clone() if isinstance(value, Tensor) else copy.copy(value))
            for key, value in vars(module).items()
            if isinstance(value, Tensor | np.ndarray | int | float)
        }
        # Forward overrides and hooks that an interrupted probe may have left behind.
        self.own_forward = module.__dict__.get("forward")
        self.hooks = {
            name: dict(getattr(module, name))
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        }

    def restore(self) -> None:
        module = self.module
        module.training = self.training
        for kind, saved in self.tensors.items():
            holder = getattr(module, kind)
            holder.clear()  # refilled in the order of old, which a state dict keeps
            holder.update(self.held[kind])
            for value, content, requires_grad, grad in saved.values():
                if value.dtype != content.dtype or value.shape != content.shape:
                    value.data = content
                else:
                    value.data.copy_(content)
                value.requires_grad_(requires_grad)
                value.grad = grad
        for key, (plain, held) in self.plain.items():
            module.__dict__[key] = plain
            if isinstance(plain, Tensor) and isinstance(held, Tensor):
                plain.data.copy_(held)
            elif isinstance(plain, np.ndarray):
                plain[...] = held
        if self.own_forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = self.own_forward
        for name, hooks in self.hooks.items():
            current = getattr(module, name)
            current.clear()
            current.update(hooks)


def _clone(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().clone()


@contextmanager
def training_mode(subject: Subject, training: bool) -> Iterator[None]:
    """All networks in train or in eval mode for a block; each module's own flag comes back."""
    flags = [(module, module.training) for _, _, module in subject.modules()]
    for module, _ in flags:
        module.training = training
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
