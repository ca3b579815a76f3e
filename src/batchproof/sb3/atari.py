"""Atari 2600 games as a vector environment of Stable-Baselines3, stepped by ale-py in threads.

    env = make_atari("breakout", 8)
    model = PPO("CnnPolicy", env)

The preprocessing is that of the library's own wrappers around a ``NoFrameskip-v4`` game
(`stable_baselines3.common.atari_wrappers`, then ``VecFrameStack`` of 4 and ``VecTransposeImage``):
up to 30 no-ops at the start, 4 frames for each action, the larger of the last two frames, grey,
84 x 84, FIRE after every reset, and in training an end of the episode at each lost life and
rewards by their sign. Frames, rewards and ends are equal to theirs, bit by bit, for equal no-ops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from batchproof.errors import BatchproofError

try:
    import cv2
    from ale_py import ALEInterface, LoggerMode, roms
    from ale_py.vector_env import AtariVectorEnv
except ImportError as error:  # pragma: no cover
    raise BatchproofError(
        f"Atari games need ale-py and OpenCV ({error}): pip install 'batchproof[atari]'"
    ) from None

SIDE = 84
STACK = 4
FRAME_SKIP = 4
NOOP, FIRE = 0, 1
AT_ONCE = 4
"""Games in motion at once: with all of them, the screens would all arrive, and wait, at the end."""


def make_atari(
    game: str, num_envs: int = 8, *, training: bool = True, seed: int | None = None
) -> AtariVecEnv:
    """Environments of one game, to train in or to evaluate in.

    Args:
        game: a ROM's name as ale-py writes it, for example ``breakout`` or ``space_invaders``.
        num_envs: games that run side by side.
        training: whether a lost life ends an episode and rewards are clipped to their sign;
            an evaluation plays whole games for their score.
        seed: of the first reset; game ``i`` has ``seed + i``.

    Raises:
        BatchproofError: an unknown game.
    """
    env = AtariVecEnv(game, num_envs, episodic_life=training, clip_reward=training)
    if seed is not None:
        env.seed(seed)
    return env


class AtariVecEnv(VecEnv):
    """``num_envs`` games: observations (num_envs, 4, 84, 84) uint8, the newest frame last.

    An info has ``lives`` and ``episode_frame_number`` and, where an episode ends,
    ``terminal_observation`` and ``TimeLimit.truncated``. Where a whole game ends it has
    ``episode`` as the library's ``Monitor`` gives it, whatever the settings: ``r`` the game's own
    score, ``l`` its frames (four for an agent's step), ``t`` seconds since the start.

    ``reset()`` always begins new games, where the library's wrappers go on with the life that
    follows. Actions do not stick.

    Args:
        game: a ROM's name as ale-py writes it.
        num_envs: games that run side by side, each in a thread of its own.
        episodic_life: whether an episode ends at each lost life; the game goes on in the next.
        clip_reward: whether rewards are clipped to their sign.
        noop_max: the most no-ops at the start of a game; as many as a draw from 1 to it says.
        max_frames: of a game, which is then truncated.

    Raises:
        BatchproofError: an unknown game.
    """

    def __init__(
        self,
        game: str,
        num_envs: int = 8,
        *,
        episodic_life: bool = True,
        clip_reward: bool = True,
        noop_max: int = 30,
        max_frames: int = 108_000,
    ) -> None:
        if num_envs < 1:
            raise BatchproofError(f"num_envs must be at least 1, got {num_envs}")
        self.game = game
        self.clip_reward = clip_reward
        height, width = _screen(game)
        self.games = [
            _Game(game, height, width, episodic_life, noop_max, max_frames) for _ in range(num_envs)
        ]
        self._stacked = np.zeros((num_envs, STACK, SIDE, SIDE), np.uint8)
        self._actions = np.zeros(num_envs, np.int64)
        self._began = time.time()
        super().__init__(
            num_envs,
            spaces.Box(0, 255, (STACK, SIDE, SIDE), np.uint8),
            spaces.Discrete(len(self.games[0].meanings)),
        )

    def reset(self) -> np.ndarray:
        """Begin a new game in each environment; the observations."""
        self._stacked = np.zeros_like(self._stacked)
        for i, game in enumerate(self.games):
            game.over = True
            self._stacked[i, -1] = _warped(game.reset(self._seeds[i]))
            self.reset_infos[i] = game.info()
        self._reset_seeds()
        self._reset_options()
        return self._stacked

    def step_async(self, actions: np.ndarray) -> None:
        """Hand the actions (num_envs,) to the games' threads."""
        self._actions = np.asarray(actions, np.int64).reshape(self.num_envs)
        for game, action in zip(self.games[:AT_ONCE], self._actions, strict=False):
            game.send(int(action))

    def step_wait(self) -> VecEnvStepReturn:
        """Observations, rewards, ends and infos of the actions that were handed over."""
        # A new array each time: the algorithms still hold the one before.
        stacked = np.empty_like(self._stacked)
        stacked[:, :-1] = self._stacked[:, 1:]
        rewards = np.empty(self.num_envs, np.float32)
        dones = np.empty(self.num_envs, bool)
        infos: list[dict[str, Any]] = []
        for i, game in enumerate(self.games):
            frame, reward, terminated, truncated = game.recv()
            if i + AT_ONCE < self.num_envs:
                self.games[i + AT_ONCE].send(int(self._actions[i + AT_ONCE]))
            rewards[i] = reward
            dones[i] = terminated or truncated
            info = game.info()
            info["TimeLimit.truncated"] = truncated and not terminated
            stacked[i, -1] = _warped(frame)
            if dones[i]:
                info["terminal_observation"] = stacked[i].copy()
                if game.over:
                    seconds = round(time.time() - self._began, 6)
                    info["episode"] = {"r": game.score, "l": game.frames, "t": seconds}
                stacked[i] = 0
                stacked[i, -1] = _warped(game.reset())
                self.reset_infos[i] = game.info()
            infos.append(info)
        if self.clip_reward:
            np.sign(rewards, out=rewards)
        self._stacked = stacked
        return stacked, rewards, dones, infos

    def close(self) -> None:
        """Stop the games' threads."""
        self.games.clear()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Each game's screen (height, width, 3), RGB."""
        return [game.screen.copy() for game in self.games]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each game, or else of this environment.

        Raises:
            AttributeError: neither has it.
        """
        games = [self.games[i] for i in self._get_indices(indices)]
        if attr_name == "render_mode":
            return ["rgb_array"] * len(games)
        return [getattr(game, attr_name) for game in games]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: the games' settings stay as they were made.

        Raises:
            BatchproofError: always.
        """
        raise BatchproofError(
            f"{attr_name} of running Atari games cannot be set: make another AtariVecEnv with it"
        )

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of each game.

        Raises:
            AttributeError: there is no such method.
        """
        methods: list[Callable[..., Any]] = self.get_attr(method_name, indices)
        return [method(*args, **kwargs) for method in methods]

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Whether each game does what the wrapper does: only ``Monitor``, whose infos it gives."""
        return [issubclass(wrapper_class, Monitor)] * len(list(self._get_indices(indices)))


class _Game:
    """One game and its episodes; a step is one action for 4 frames.

    ale-py's own episodic life would begin a new game at each lost life, and its own FIRE lasts one
    frame, so both are done here, which takes a vector of one environment for each game.
    """

    def __init__(
        self,
        name: str,
        height: int,
        width: int,
        episodic_life: bool,
        noop_max: int,
        max_frames: int,
    ) -> None:
        self.episodic_life = episodic_life
        self.noop_max = noop_max
        self.max_frames = max_frames
        # It draws from 0 to one less than its noop_max.
        self.native = AtariVectorEnv(
            name,
            1,
            num_threads=1,
            max_num_frames_per_episode=10**9,  # counted here, with the no-ops
            img_height=height,
            img_width=width,
            grayscale=False,
            stack_num=1,
            frameskip=FRAME_SKIP,
            noop_max=noop_max + 1,
            reward_clipping=False,
            use_fire_reset=False,
        )
        self.meanings = [action.name for action in self.native.ale.get_action_set()]
        self.over = True
        self.lives = 0
        self.frames = 0
        self.score = 0.0
        self.screen = np.zeros((height, width, 3), np.uint8)

    def info(self) -> dict[str, Any]:
        return {"lives": self.lives, "episode_frame_number": self.frames}

    def send(self, action: int) -> None:
        self.native.send(np.array([action]))

    def recv(self) -> tuple[np.ndarray, float, bool, bool]:
        """Screen, reward, terminated, truncated; a lost life may terminate."""
        observations, rewards, terminations, _, info = self.native.recv()
        self.screen = observations[0, 0]
        reward, terminated = float(rewards[0]), bool(terminations[0])
        lives, self.frames = int(info["lives"][0]), int(info["episode_frame_number"][0])
        truncated = self.frames >= self.max_frames
        self.over = terminated or truncated
        self.score += reward
        # No lives left is no end yet: some games show that for a few frames before they are over.
        lost = 0 < lives < self.lives
        self.lives = lives
        return self.screen, reward, terminated or (self.episodic_life and lost), truncated

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        self.send(action)
        screen, _, terminated, truncated = self.recv()
        return screen, terminated or truncated

    def reset(self, seed: int | None = None) -> np.ndarray:
        """The screen at the start of the next episode: of a game, or of a life."""
        screen = self._start(seed)
        if "FIRE" in self.meanings:
            for action in (FIRE, FIRE + 1):
                screen, done = self.step(action)
                if done:
                    self._start()
        return screen

    def _start(self, seed: int | None = None) -> np.ndarray:
        if self.over or not self.episodic_life:
            return self._new_game(seed)
        screen, _ = self.step(NOOP)
        return self._new_game() if self.over else screen

    def _new_game(self, seed: int | None = None) -> np.ndarray:
        # The library's wrappers seed a game's emulator and no-ops once, and so does this.
        observations, info = self.native.reset(seed=None if seed is None else seed % 2**31)
        while self.noop_max > 0 and info["episode_frame_number"][0] == 0:
            observations, info = self.native.reset()
        self.over, self.score = False, 0.0
        self.lives, self.frames = int(info["lives"][0]), int(info["episode_frame_number"][0])
        self.screen = observations[0, 0]
        return self.screen


def _screen(game: str) -> tuple[int, int]:
    """Height and width of a game's screen.

    Raises:
        BatchproofError: an unknown game.
    """
    rom = roms.get_rom_path(game) if game in roms.get_all_rom_ids() else None
    if rom is None:
        raise BatchproofError(
            f"unknown game {game!r}: write a ROM's name as ale-py does, for example 'breakout' or "
            "'space_invaders'"
        )
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator = ALEInterface()
    emulator.loadROM(rom)
    height, width = emulator.getScreenDims()
    return int(height), int(width)


def _warped(screen: np.ndarray) -> np.ndarray:
    """Grey and 84 x 84, as the library's ``WarpFrame``."""
    grey = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
