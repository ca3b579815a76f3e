"""What to train: an agent, an environment, seeds and lengths."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from types import ModuleType
from typing import Any

from batchproof.errors import BatchproofError
from batchproof.lab.agents import AGENTS
from batchproof.lab.envs.layout import Layout
from batchproof.modes import Plan

NOT_DIVERGED = -1  # in place of the environment step at which a seed diverged


@dataclass(frozen=True)
class Training:
    """One run: an agent, an environment, seeds and lengths.

    Attributes:
        algo: a name in `batchproof.lab.agents.AGENTS`.
        config: that agent's configuration.
        env_id: a Gymnasium id.
        env_options: keyword arguments of `gymnasium.make`: one dictionary for all seeds, or one
            for each.
        seeds: distinct, not negative.
        steps: environment steps of each seed.
        learning_starts: environment steps with uniform actions and no learning.
        random_behaviour: keep acting uniformly: learning from data that never shifts.
        buffer_size: replay capacity in transitions; never more than ``steps`` are allocated.
        update_every: environment steps between two blocks of updates.
        gradient_steps: updates in a block.
        eval_every: environment steps between evaluations; None is a fortieth of ``steps``.
        eval_episodes: deterministic episodes per evaluation and seed.
        host_env: step on the host even where the environment also exists in JAX.
        normalize_obs: normalize observations by running statistics, see `batchproof.lab.obs_norm`.
    """

    algo: str
    config: Any
    env_id: str
    env_options: Any = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    steps: int = 3000
    learning_starts: int = 100
    random_behaviour: bool = False
    buffer_size: int = 1_000_000
    update_every: int = 1
    gradient_steps: int = 1
    eval_every: int | None = None
    eval_episodes: int = 1
    host_env: bool = False
    normalize_obs: bool = False

    def __post_init__(self) -> None:
        if self.algo not in AGENTS:
            raise BatchproofError(
                f"unknown algorithm {self.algo!r}: use one of {', '.join(AGENTS)}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise BatchproofError(
                f"seeds must be distinct and not negative, at least one, got {list(self.seeds)}"
            )
        if max(self.seeds) >= 2**32:
            raise BatchproofError(f"seeds must be less than 2**32, got {max(self.seeds)}")
        for name in ("steps", "buffer_size", "update_every", "gradient_steps", "eval_episodes"):
            if getattr(self, name) < 1:
                raise BatchproofError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_every is not None and self.eval_every < 1:
            raise BatchproofError(f"eval_every must be at least 1, got {self.eval_every}")
        if not 0 <= self.learning_starts < self.steps:
            raise BatchproofError(
                f"learning_starts must be at least 0 and less than steps ({self.steps}), "
                f"got {self.learning_starts}: nothing would be learned"
            )
        if self.blocks_before(self.steps) == 0:
            raise BatchproofError(
                f"update_every {self.update_every} leaves no update between learning_starts "
                f"({self.learning_starts}) and steps ({self.steps}): choose a smaller one"
            )
        if self.config.actor.precision != "float32":
            raise BatchproofError(
                "precision is for the critics: an actor's rounding would be in every action, and "
                "an exported one would act differently"
            )
        if self.normalize_obs and self.agent.STEPPER != "off_policy":
            raise BatchproofError(
                f"normalize_obs is for agents that replay: give {self.algo} a norm on its input "
                "instead (--norm batch --placement input)"
            )
        if not isinstance(self.env_options, dict) and len(self.env_options) != len(self.seeds):
            raise BatchproofError(
                f"env_options needs one dictionary, or one for each of the {len(self.seeds)} "
                f"seeds, got {len(self.env_options)}"
            )

    @property
    def agent(self) -> ModuleType:
        """The agent's module."""
        return AGENTS[self.algo]

    def blocks_before(self, step: Any) -> Any:
        """Blocks of updates among the first ``step`` environment steps, from `learning_starts` on.

        As in Stable-Baselines3, one follows each multiple of ``update_every`` environment steps
        that is past ``learning_starts``.
        """
        return step // self.update_every - self.learning_starts // self.update_every

    @property
    def capacity(self) -> int:
        """Rows of the replay that can ever be filled."""
        return min(self.buffer_size, self.steps)

    @property
    def evaluation_interval(self) -> int:
        """Environment steps between evaluations."""
        return self.eval_every or max(1, self.steps // 40)

    def options_of(self, seed_index: int) -> dict[str, Any]:
        """The environment options of one seed."""
        if isinstance(self.env_options, dict):
            return self.env_options
        return self.env_options[seed_index]

    def record(self) -> dict[str, Any]:
        """The run as JSON values; two runs with equal records give equal results."""
        return plain(self)


def plain(value: Any) -> Any:
    """A configuration as JSON values, but for fields that say that they change no result."""
    if isinstance(value, Plan):
        return str(value)
    if is_dataclass(value):
        kept = [f for f in fields(value) if f.metadata.get("record", True)]
        return {f.name: plain(getattr(value, f.name)) for f in kept}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def check_agents(training: Training, layout: Layout | None) -> None:
    """Raise unless the algorithm trains as many agents as the environment has."""
    if layout is not None and not training.agent.MULTI_AGENT:
        raise BatchproofError(
            f"{training.env_id} has {len(layout.names)} agents, but {training.algo} trains one: "
            f"use {_trains(several=True)}"
        )
    if layout is None and training.agent.MULTI_AGENT:
        raise BatchproofError(
            f"{training.env_id} has one agent, but {training.algo} trains several: "
            f"use {_trains(several=False)}"
        )


def _trains(several: bool) -> str:
    found = [
        name
        for name, agent in AGENTS.items()
        if agent.STEPPER == "off_policy" and several == agent.MULTI_AGENT
    ]
    return ", ".join(found)
