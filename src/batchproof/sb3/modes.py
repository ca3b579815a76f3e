"""Mode plans inside Stable-Baselines3: which statistics every pass of its own update uses.

The library's ``train()`` stays as it is. The entry points of the networks (``forward``,
``q1_forward``, ``action_log_prob``) are replaced on the instances; each call then finds its slot:

| call during the update | slot |
|---|---|
| actor, gradients recorded | 1 |
| actor or target actor, under ``no_grad`` | 2 |
| critic, on an action that carries a gradient | 3 |
| critic, on an action that carries none | 4 |
| target critic | 5 |

The update is told apart from acting by the network's own flag: the library puts its networks in
train mode at the start of ``train()`` and in eval mode to act, and acting is slot 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from batchproof.errors import BatchproofError
from batchproof.layers import mode_layers, use_mode
from batchproof.modes import Mode, Plan, Slot

ATTRIBUTE = "batchproof_modes"
"""The model's attribute that holds the plan as a string: it is saved and loaded with the model."""

_ENTRIES = ("forward", "q1_forward", "action_log_prob")


def set_modes(model: Any, plan: str | Plan | None = None) -> None:
    """Make a SAC, TD3, DDPG or TQC train and act under a mode plan.

    A former plan is replaced. ``model.save`` keeps the plan, but loading builds new networks: call
    ``set_modes(model)`` after ``load``. After ``load_replay_buffer`` a plan with ``J`` or ``M``
    must be set again as well, for those need the replayed batch.

    Args:
        model: the Stable-Baselines3 model; its networks' normalization layers may be those of
            `batchproof.layers`, torch's batch norms, or sb3-contrib's batch renorm.
        plan: five letters for slots 1 to 5, six with slot 0 in front, or a preset's name; None
            takes the plan that the model was saved with.

    Raises:
        BatchproofError: another algorithm, no normalization layer that a mode could act on, an
            impossible plan, or no plan to take.
    """
    networks = _networks(model)
    if plan is None:
        plan = getattr(model, ATTRIBUTE, None)
        if plan is None:
            raise BatchproofError(
                "this model was not saved under a mode plan: name one, for example "
                'set_modes(model, "TEETE")'
            )
    parsed = Plan.parse(plan)
    if not any(mode_layers(network) for network in networks.values()):
        raise BatchproofError(
            f"this {type(model).__name__} has no layer that uses batch or running statistics, so "
            "a mode plan changes nothing: add some, for example with "
            'batchproof.sb3.policies.NormTD3Policy and policy_kwargs={"norm": "batch"}'
        )
    clear_modes(model)
    update = _Update(parsed)
    for role, network in networks.items():
        online = networks[role.removesuffix("_target")]
        kind = _ActorPass if role.startswith("actor") else _CriticPass
        for entry in _ENTRIES:
            if hasattr(type(network), entry):
                setattr(network, entry, kind(network, entry, online, update))
    if parsed.joint or parsed[Slot.POLICY_Q].kind == "M":
        model.replay_buffer.sample = _Sample(model.replay_buffer, update)
    setattr(model, ATTRIBUTE, str(parsed))


def get_modes(model: Any) -> str | None:
    """The plan that the model trains under now; None where the library decides.

    A model that was loaded remembers its plan but does not run it until ``set_modes(model)``.
    """
    actor = getattr(getattr(model, "policy", None), "actor", None)
    entry = vars(actor).get("forward") if isinstance(actor, nn.Module) else None
    return str(entry.update.plan) if isinstance(entry, _Pass) else None


def remembered_modes(model: Any) -> str | None:
    """The plan that the model was last given, also before a save and a load; None without one."""
    return getattr(model, ATTRIBUTE, None)


def clear_modes(model: Any) -> None:
    """Give the model back to the library: it trains and acts as if no plan had ever been set."""
    for network in _networks(model).values():
        for entry in _ENTRIES:
            if isinstance(vars(network).get(entry), _Pass):
                delattr(network, entry)
    buffer = model.replay_buffer
    if buffer is not None and isinstance(vars(buffer).get("sample"), _Sample):
        del buffer.sample
    if hasattr(model, ATTRIBUTE):
        delattr(model, ATTRIBUTE)


def _networks(model: Any) -> dict[str, nn.Module]:
    """The networks by role.

    Raises:
        BatchproofError: an algorithm without the five slots.
    """
    name = type(model).__name__
    if isinstance(model, OnPolicyAlgorithm):
        raise BatchproofError(
            f"a mode plan is for SAC, TD3, DDPG and TQC: {name} has no critic of actions and no "
            "target networks (slots 2 to 5); for it use batchproof.sb3.OnPolicyModes, or a norm of "
            'single rows, norm="layer"'
        )
    policy = getattr(model, "policy", None)
    actor, critic = getattr(policy, "actor", None), getattr(policy, "critic", None)
    if isinstance(model, OffPolicyAlgorithm) and actor is None:
        raise BatchproofError(
            f"a mode plan is for SAC, TD3, DDPG and TQC: {name} has no actor (slots 1 to 3); "
            'for it use a norm of single rows, norm="layer"'
        )
    if isinstance(model, OffPolicyAlgorithm) and getattr(policy, "critic_target", None) is None:
        raise BatchproofError(
            f"a mode plan is for SAC, TD3, DDPG and TQC: {name} has no target critic and runs a "
            "plan of its own (CrossQ: TEEJJ); leave it as it is, or take SAC"
        )
    if not isinstance(model, OffPolicyAlgorithm) or critic is None:
        raise BatchproofError(
            f"a mode plan is for SAC, TD3, DDPG and TQC of Stable-Baselines3, not for a {name}"
        )
    roles = ("actor", "critic", "actor_target", "critic_target")
    found = {role: getattr(policy, role, None) for role in roles}
    return {role: network for role, network in found.items() if network is not None}


class _Update:
    """What the passes of one update share: the plan and the batches that ``J`` and ``M`` join."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.batch: Any = None  # the library's own samples, set by `_Sample`
        self.next_input: tuple[Any, Tensor] | None = None  # (s', a'), set by slot 5

    def __getstate__(self) -> dict[str, Any]:
        # Batches belong to one update and are not worth a place in a file.
        return {"plan": self.plan, "batch": None, "next_input": None}

    def replayed(self, *expected: tuple[str, Any]) -> Any:
        """The batch of this update, which must hold these very tensors.

        Raises:
            BatchproofError: the pass is on other data than the last sample.
        """
        for name, value in expected:
            if self.batch is None or getattr(self.batch, name) is not value:
                raise BatchproofError(
                    f"the mode plan {self.plan} joins a pass with the replayed batch, but this "
                    "pass is not on the batch last sampled: after replacing the replay buffer "
                    "call set_modes(model), and outside train() put the network in eval mode"
                )
        return self.batch


class _Pass:
    """In place of a network's entry point: the class's own, in the mode of the call's slot.

    An object, not a closure, so that a copy or a pickle of the network refers to its own parts.
    """

    def __init__(self, network: nn.Module, entry: str, online: nn.Module, update: _Update) -> None:
        self.network = network
        self.entry = entry
        self.online = online  # its flag tells training from acting; a target's is always eval
        self.update = update

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The library's own pass."""
        return getattr(type(self.network), self.entry)(self.network, *args, **kwargs)

    def under(self, mode: Mode, *args: Any, **kwargs: Any) -> Any:
        """The same with every normalization layer in ``mode``."""
        with use_mode(self.network, mode):
            return self.own(*args, **kwargs)


class _ActorPass(_Pass):
    """Slots 0, 1 and 2."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.update.plan
        if self.online.training:
            slot = Slot.ACTOR_UPDATE if torch.is_grad_enabled() else Slot.TARGET_ACTION
            return self.under(plan[slot], *args, **kwargs)
        if self.network is not self.online or plan[Slot.ACT].kind == "E":
            return self.own(*args, **kwargs)
        return self.under(plan[Slot.ACT], *args, **kwargs)


class _CriticPass(_Pass):
    """Slots 3, 4 and 5; ``J`` and ``M`` are ``T`` on two batches in one pass."""

    def __call__(self, obs: Any, actions: Tensor) -> Any:
        if not self.online.training:
            return self.own(obs, actions)
        update = self.update
        if self.network is not self.online:
            slot = Slot.TARGET_Q
        else:
            slot = Slot.POLICY_Q if actions.requires_grad else Slot.REPLAY_Q
        mode = update.plan[slot]
        if mode.kind not in "JM":
            return self.under(mode, obs, actions)
        both = Mode("T" if mode.updates else "t")
        rows = len(actions)
        if slot is Slot.TARGET_Q:
            batch = update.replayed(("next_observations", obs))
            update.next_input = (obs, actions)
            joined = join(batch.observations, obs), torch.cat([batch.actions, actions])
            return _rows(self.under(both, *joined), slice(rows, None))
        if slot is Slot.REPLAY_Q:
            batch = update.replayed(("observations", obs), ("actions", actions))
            if update.next_input is None or update.next_input[0] is not batch.next_observations:
                raise BatchproofError(
                    f"the mode plan {update.plan} joins slots 4 and 5, but the target critic was "
                    "not asked before the critic: this train() is not Stable-Baselines3's own"
                )
            other_obs, other_actions = update.next_input
        else:
            batch = update.replayed(("observations", obs))
            other_obs, other_actions = batch.observations, batch.actions
        joined = join(obs, other_obs), torch.cat([actions, other_actions])
        return _rows(self.under(both, *joined), slice(None, rows))


class _Sample:
    """In place of a replay buffer's ``sample``: the same, and the update is shown the batch."""

    def __init__(self, buffer: Any, update: _Update) -> None:
        self.buffer = buffer
        self.update = update

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.update.batch = type(self.buffer).sample(self.buffer, *args, **kwargs)
        self.update.next_input = None
        return self.update.batch

    def __reduce__(self) -> tuple[Any, ...]:
        # A saved replay buffer comes back with its own `sample`, also where Batchproof is missing.
        return getattr, (self.buffer, "sample")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sample:
        return _Sample(copy.deepcopy(self.buffer, memo), copy.deepcopy(self.update, memo))


def join(first: Any, second: Any) -> Any:
    """Two batches of observations, one after the other."""
    if isinstance(first, dict):
        return {key: torch.cat([part, second[key]]) for key, part in first.items()}
    return torch.cat([first, second])


def _rows(output: Any, rows: slice) -> Any:
    """These rows of what a critic gives: a tensor, or a tuple of one for each critic."""
    if isinstance(output, tuple):
        return tuple(part[rows] for part in output)
    return output[rows]
