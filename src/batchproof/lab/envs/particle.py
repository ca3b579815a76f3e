"""Three multi-agent particle tasks of mpe2 in JAX (Lowe et al., arXiv 1706.02275).

Equal to mpe2's with continuous actions step by step. The world: points of mass 1 in a plane,
pushed, damped and, in `Spread`, kept apart; an agent moves by [nothing, left, right, down, up] and
says a vector that the others hear one step later.

Shapes: ``n`` agents, ``C`` the length of what is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.envs.options import check_whole
from batchproof.lab.envs.jax_env import Step
from batchproof.lab.envs.layout import Layout

DT = 0.1  # seconds per step
DAMPING = 0.25  # of the speed, per step
PUSH = 5.0  # force of a full move
SIZE = 0.15  # radius of an agent that collides
CONTACT_FORCE, CONTACT_MARGIN = 100.0, 1e-3
LANDMARKS = 3
MOVES = 5
EPISODE_STEPS = 25


class World(NamedTuple):
    """Where everything is."""

    place: Array  # (n, 2) of the agents
    speed: Array  # (n, 2)
    landmarks: Array  # (3, 2)
    goals: Array  # (n,) int, the landmark that each agent knows to be another's goal
    said: Array  # (n, C)
    steps: Array  # () int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spread:
    """``simple_spread``: three agents cover three landmarks and do not collide."""

    limit: Array  # () int, steps of an episode
    local_ratio: Array  # () share of an agent's own collisions in its reward

    layout: ClassVar[Layout] = Layout(
        ("agent_0", "agent_1", "agent_2"), (18,) * 3, (MOVES,) * 3, "sum"
    )
    obs_size: ClassVar[int] = 54
    action_size: ClassVar[int] = 15
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(cls, max_cycles: int = EPISODE_STEPS, local_ratio: float = 0.5) -> Spread:
        """Build it with episodes of ``max_cycles`` steps."""
        return cls(_limit(max_cycles, "simple_spread"), jnp.asarray(float(local_ratio)))

    def reset(self, key: Array) -> tuple[World, Array]:
        """Agents and landmarks anywhere within 1, at rest."""
        world = _start(key, agents=3, words=2)
        return world, self._observe(world)

    def step(self, key: Array, state: World, action: Array) -> Step:
        """One step: all share minus the landmarks' distances, each pays for its collisions."""
        push = _push(jnp.stack(self.layout.split_actions(action)))
        world = _move(state, push + _repulsion(state.place), state.said)
        to_landmarks = _distance(world.landmarks[:, None] - world.place)
        hits = _distance(world.place[:, None] - world.place) < 2 * SIZE
        own = -(hits.sum(1) - 1.0)
        reward = -to_landmarks.min(1).sum() * (1 - self.local_ratio) + own * self.local_ratio
        return _step(world, self._observe(world), reward, self.limit)

    def _observe(self, world: World) -> Array:
        return _join(
            [
                world.speed[i],
                world.place[i],
                world.landmarks - world.place[i],
                _others(world.place, i) - world.place[i],
                _others(world.said, i),
            ]
            for i in range(3)
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeakerListener:
    """``simple_speaker_listener``: one agent sees the goal, the other can go there."""

    limit: Array  # () int, steps of an episode

    layout: ClassVar[Layout] = Layout(("speaker_0", "listener_0"), (3, 11), (3, MOVES), "sum")
    obs_size: ClassVar[int] = 14
    action_size: ClassVar[int] = 8
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(cls, max_cycles: int = EPISODE_STEPS) -> SpeakerListener:
        """Build it with episodes of ``max_cycles`` steps."""
        return cls(_limit(max_cycles, "simple_speaker_listener"))

    def reset(self, key: Array) -> tuple[World, Array]:
        """Agents and landmarks anywhere within 1, at rest, and any goal."""
        world = _start(key, agents=2, words=3)
        return world, self._observe(world)

    def step(self, key: Array, state: World, action: Array) -> Step:
        """One step: both get minus the squared distance of listener and goal."""
        words, moves = self.layout.split_actions(action)
        push = jnp.stack([jnp.zeros(2), _push(moves)])
        said = jnp.stack([_from_zero(words), jnp.zeros(3)])
        world = _move(state, push, said)
        gap = world.place[1] - world.landmarks[world.goals[0]]
        reward = jnp.broadcast_to(-jnp.square(gap).sum(), 2)
        return _step(world, self._observe(world), reward, self.limit)

    def _observe(self, world: World) -> Array:
        color = _colors(0.65, 0.15)[world.goals[0]]
        place = world.place[1]
        return _join([[color], [world.speed[1], world.landmarks - place, world.said[0]]])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reference:
    """``simple_reference``: each agent knows where the other should go, and can tell it."""

    limit: Array  # () int, steps of an episode
    local_ratio: Array  # () share in an agent's reward of the distance that it knows

    layout: ClassVar[Layout] = Layout(("agent_0", "agent_1"), (21, 21), (15, 15), "sum")
    obs_size: ClassVar[int] = 42
    action_size: ClassVar[int] = 30
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(cls, max_cycles: int = EPISODE_STEPS, local_ratio: float = 0.5) -> Reference:
        """Build it with episodes of ``max_cycles`` steps."""
        return cls(_limit(max_cycles, "simple_reference"), jnp.asarray(float(local_ratio)))

    def reset(self, key: Array) -> tuple[World, Array]:
        """Agents and landmarks anywhere within 1, at rest, and any goals."""
        world = _start(key, agents=2, words=10)
        return world, self._observe(world)

    def step(self, key: Array, state: World, action: Array) -> Step:
        """One step: minus the distance of the other agent to its goal, and the mean of both."""
        actions = jnp.stack(self.layout.split_actions(action))
        world = _move(state, _push(actions[:, :MOVES]), _from_zero(actions[:, MOVES:]))
        own = -_distance(world.place[::-1] - world.landmarks[world.goals])
        reward = own.mean() * (1 - self.local_ratio) + own * self.local_ratio
        return _step(world, self._observe(world), reward, self.limit)

    def _observe(self, world: World) -> Array:
        colors = _colors(0.75, 0.25)
        return _join(
            [
                world.speed[i],
                world.landmarks - world.place[i],
                colors[world.goals[i]],
                world.said[1 - i],
            ]
            for i in range(2)
        )


def _limit(max_cycles: int, name: str) -> Array:
    option = f"max_cycles of mpe2/{name} in JAX"
    check_whole(option, max_cycles, EPISODE_STEPS, "for longer episodes add --host-env")
    return jnp.asarray(max_cycles, jnp.int32)


def _start(key: Array, agents: int, words: int) -> World:
    place_key, goal_key = jax.random.split(key)
    places = jax.random.uniform(place_key, (agents + LANDMARKS, 2), minval=-1, maxval=1)
    return World(
        place=places[:agents],
        speed=jnp.zeros((agents, 2)),
        landmarks=places[agents:],
        goals=jax.random.randint(goal_key, (agents,), 0, LANDMARKS),
        said=jnp.zeros((agents, words)),
        steps=jnp.zeros((), jnp.int32),
    )


def _from_zero(action: Array) -> Array:
    """From [-1, 1] to mpe2's [0, 1]."""
    return 0.5 * (jnp.clip(action, -1, 1) + 1)


def _push(moves: Array) -> Array:
    """Force (..., 2) of moves (..., 5)."""
    moves = _from_zero(moves)
    return PUSH * jnp.stack([moves[..., 2] - moves[..., 1], moves[..., 4] - moves[..., 3]], -1)


def _repulsion(place: Array) -> Array:
    """Force (n, 2) that keeps agents apart, about 100 times the depth of their overlap."""
    gap = place[:, None] - place
    alone = jnp.eye(len(place), dtype=bool)
    distance = jnp.where(alone, 1.0, _distance(gap))
    depth = CONTACT_MARGIN * jnp.logaddexp(0.0, (2 * SIZE - distance) / CONTACT_MARGIN)
    # No one pushes itself: its gap is zero.
    return (CONTACT_FORCE * (depth / distance)[..., None] * gap).sum(1)


def _move(world: World, force: Array, said: Array) -> World:
    return world._replace(
        place=world.place + DT * world.speed,
        speed=(1 - DAMPING) * world.speed + DT * force,
        said=said,
        steps=world.steps + 1,
    )


def _step(world: World, obs: Array, reward: Array, limit: Array) -> Step:
    return Step(world, obs, reward, jnp.asarray(False), world.steps >= limit)


def _distance(gap: Array) -> Array:
    return jnp.sqrt(jnp.square(gap).sum(-1))


def _others(values: Array, i: int) -> Array:
    return jnp.concatenate([values[:i], values[i + 1 :]])


def _colors(bright: float, dark: float) -> Array:
    """One color (3,) for each landmark."""
    return jnp.where(jnp.eye(LANDMARKS, dtype=bool), bright, dark)


def _join(agents: Iterable[list[Array]]) -> Array:
    return jnp.concatenate([jnp.ravel(part) for parts in agents for part in parts])
