"""Stable-Baselines3 policies with normalization by keyword, for MLPs.

Every hidden layer becomes Linear - norm - activation; the output layers stay as they are.

    TD3(NormTD3Policy, env, policy_kwargs={"norm": "batch"})

Keywords, beside those of the library's own policy:

``norm``
    what normalizes actor and critics alike: ``none`` (or None), ``batch``, ``renorm``, ``layer``,
    ``group`` or ``rms``.
``actor_norm``, ``critic_norm``
    the same for one of them; they stand over ``norm``.
``norm_options``
    keywords of the layers' constructors (`batchproof.layers.create_norm`), for example
    ``{"momentum": 0.01}``; refused where nothing is normalized.

``none`` is the library's own policy: the same parameters, names and random draws. Models save and
load by the library's own ``save`` and ``load``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.layers import create_norm


def normalized(
    net: nn.Sequential, norm: str, options: Mapping[str, Any] | None = None, *, output: bool = True
) -> nn.Sequential:
    """The same MLP with a norm after each hidden Linear.

    Args:
        net: Linear layers with activations between them.
        norm: what normalizes; ``none`` gives ``net`` back.
        options: keywords of the norm's constructor.
        output: whether the last Linear is an output layer, which is not normalized.

    Raises:
        BatchproofError: an unknown norm or option, or no hidden layer to normalize.
    """
    if norm == "none":
        return net
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    hidden = linear[:-1] if output else linear
    if not hidden:
        raise BatchproofError(
            f"norm {norm!r} goes after hidden layers and this network has none: give net_arch at "
            "least one, for example [256, 256]"
        )
    layers: list[nn.Module] = []
    for layer in net:
        layers.append(layer)
        if isinstance(layer, nn.Linear) and layer in hidden:
            layers.append(create_norm(norm, layer.out_features, **(options or {})))
    return nn.Sequential(*layers)


class NormTD3Policy(TD3Policy):
    """TD3's and DDPG's MLP policy with norms in actor and critics, in the targets as well.

    Train it under a plan (`batchproof.sb3.modes.set_modes`): the library's own cannot show the
    actor a shift that all actions of a batch share.
    """

    def __init__(
        self,
        *args: Any,
        norm: str | None = "none",
        actor_norm: str | None = None,
        critic_norm: str | None = None,
        norm_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The library's constructor builds the networks, so these must be known before.
        self.actor_norm, self.critic_norm = _chosen(
            norm, actor_norm, critic_norm, norm_options=norm_options
        )
        self.norm_options = norm_options
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> TD3Actor:
        """The library's actor with norms."""
        actor = super().make_actor(features_extractor)
        actor.mu = normalized(actor.mu, self.actor_norm, self.norm_options)
        return actor.to(self.device)

    def make_critic(
        self, features_extractor: BaseFeaturesExtractor | None = None
    ) -> ContinuousCritic:
        """The library's critics with norms."""
        critic = super().make_critic(features_extractor)
        return _normalize_critics(critic, self.critic_norm, self.norm_options).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | _norm_parameters(self)


class NormSACPolicy(SACPolicy):
    """SAC's MLP policy with norms in actor and critics, in the targets as well.

    Train it under a plan (`batchproof.sb3.modes.set_modes`), as `NormTD3Policy`.
    """

    def __init__(
        self,
        *args: Any,
        norm: str | None = "none",
        actor_norm: str | None = None,
        critic_norm: str | None = None,
        norm_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.actor_norm, self.critic_norm = _chosen(
            norm, actor_norm, critic_norm, norm_options=norm_options
        )
        self.norm_options = norm_options
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> SACActor:
        """The library's actor with norms; mean and deviation share its hidden layers."""
        actor = super().make_actor(features_extractor)
        actor.latent_pi = normalized(
            actor.latent_pi, self.actor_norm, self.norm_options, output=False
        )
        return actor.to(self.device)

    def make_critic(
        self, features_extractor: BaseFeaturesExtractor | None = None
    ) -> ContinuousCritic:
        """The library's critics with norms."""
        critic = super().make_critic(features_extractor)
        return _normalize_critics(critic, self.critic_norm, self.norm_options).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | _norm_parameters(self)


class NormDQNPolicy(DQNPolicy):
    """DQN's MLP policy with norms in the Q-network and its target; keywords norm, norm_options."""

    def __init__(
        self,
        *args: Any,
        norm: str | None = "none",
        norm_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        (self.norm,) = _chosen(norm, norm_options=norm_options)
        self.norm_options = norm_options
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> QNetwork:
        """The library's Q-network with norms."""
        network = super().make_q_net()
        network.q_net = normalized(network.q_net, self.norm, self.norm_options)
        return network.to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"norm": self.norm, "norm_options": self.norm_options}
        return super()._get_constructor_parameters() | own


class NormActorCriticPolicy(ActorCriticPolicy):
    """PPO's and A2C's MLP policy with norms: ``actor_norm`` in pi, ``critic_norm`` in vf.

    Take ``layer``, ``group`` or ``rms``: PPO collects in eval mode and updates in train mode, so
    with ``batch`` and ``renorm`` the ratio of its first minibatch is not 1.
    """

    def __init__(
        self,
        *args: Any,
        norm: str | None = "none",
        actor_norm: str | None = None,
        critic_norm: str | None = None,
        norm_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.actor_norm, self.critic_norm = _chosen(
            norm, actor_norm, critic_norm, norm_options=norm_options
        )
        self.norm_options = norm_options
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        both: Any = self.mlp_extractor
        options = self.norm_options
        both.policy_net = normalized(both.policy_net, self.actor_norm, options, output=False)
        both.value_net = normalized(both.value_net, self.critic_norm, options, output=False)
        both.to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | _norm_parameters(self)


def _chosen(
    norm: str | None, *parts: str | None, norm_options: dict[str, Any] | None
) -> tuple[str, ...]:
    """What normalizes each network; None is ``norm``, and for ``norm`` itself it is ``none``.

    Raises:
        BatchproofError: options of a norm where there is none.
    """
    both = "none" if norm is None else norm
    chosen = tuple(both if part is None else part for part in parts) or (both,)
    if norm_options and set(chosen) == {"none"}:
        raise BatchproofError(
            "norm_options are for a norm and nothing is normalized: give norm, for example "
            "'batch', or leave norm_options out"
        )
    return chosen


def _normalize_critics(
    critic: ContinuousCritic, norm: str, options: dict[str, Any] | None
) -> ContinuousCritic:
    networks: list[Any] = critic.q_networks
    for i, net in enumerate(networks):
        # The library keeps each critic twice: in a plain list, and under the name torch sees.
        networks[i] = normalized(net, norm, options)
        setattr(critic, f"qf{i}", networks[i])
    return critic


def _norm_parameters(policy: Any) -> dict[str, Any]:
    return {
        "actor_norm": policy.actor_norm,
        "critic_norm": policy.critic_norm,
        "norm_options": policy.norm_options,
    }
