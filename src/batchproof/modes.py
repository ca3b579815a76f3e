"""Slots, modes and plans: which statistics each forward pass of a normalized network uses.

An off-policy actor-critic update has five passes, the slots 1 to 5 (numbered after arXiv
2509.23750), and acting is slot 0. A mode is a letter. A plan is five letters, slots 1 to 5, or six
with slot 0 in front. Both halves of the project read their plans from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from batchproof.errors import BatchproofError


class Slot(IntEnum):
    """The passes of an off-policy actor-critic update, with acting as slot 0."""

    ACT = 0
    ACTOR_UPDATE = 1
    TARGET_ACTION = 2
    POLICY_Q = 3
    REPLAY_Q = 4
    TARGET_Q = 5

    @property
    def title(self) -> str:
        """What the pass computes, in words."""
        return _SLOT_TITLES[self]


_SLOT_TITLES = {
    Slot.ACT: "actor on the observation, when choosing an action",
    Slot.ACTOR_UPDATE: "actor on s, in its own loss",
    Slot.TARGET_ACTION: "actor (or target actor) on s'",
    Slot.POLICY_Q: "critic on (s, pi(s)), in the actor's loss",
    Slot.REPLAY_Q: "critic on the replayed (s, a)",
    Slot.TARGET_Q: "critic (or target critic) on (s', a')",
}

_TITLES = {
    "T": "the batch's statistics, with gradient through them",
    "E": "the running statistics",
    "S": "the batch's statistics, gradient through them stopped",
    "J": "the statistics of slots 4 and 5 in one concatenated forward",
    "M": "the statistics of the policy batch concatenated with the replay batch",
    "B": "no statistics: the layer is skipped",
}


@dataclass(frozen=True)
class Mode:
    """What a normalization layer does in one forward pass.

    Attributes:
        letter: ``T``, ``E``, ``S``, ``J``, ``M`` or ``B``; a lower-case letter (``t``, ``s``,
            ``j``, ``m``) is the same mode with the running statistics left alone.
    """

    letter: str

    def __post_init__(self) -> None:
        if self.letter.upper() not in _TITLES or len(self.letter) != 1:
            raise BatchproofError(
                f"unknown mode {self.letter!r}: use one of {', '.join(_TITLES)}, or its lower-case "
                "letter to leave the running statistics alone"
            )
        if self.letter in ("e", "b"):  # nothing to leave alone: one mode, one spelling
            object.__setattr__(self, "letter", self.letter.upper())

    @property
    def kind(self) -> str:
        """The mode without its case: one of ``TESJMB``."""
        return self.letter.upper()

    @property
    def uses_batch(self) -> bool:
        """Whether the statistics come from the rows of this very forward pass."""
        return self.kind in "TSJM"

    @property
    def updates(self) -> bool:
        """Whether the running statistics move."""
        return self.uses_batch and self.letter.isupper()

    @property
    def gradient(self) -> bool:
        """Whether the gradient flows through the statistics."""
        return self.kind in "TJM"

    @property
    def bypass(self) -> bool:
        """Whether the layer is skipped."""
        return self.kind == "B"

    @property
    def title(self) -> str:
        """The mode in words."""
        kept = "" if self.updates or not self.uses_batch else "; running statistics left alone"
        return _TITLES[self.kind] + kept

    def __str__(self) -> str:
        return self.letter


T, E, S, B = Mode("T"), Mode("E"), Mode("S"), Mode("B")
"""The modes a single layer can be asked for; ``J`` and ``M`` are ``T`` on a concatenated batch."""

PRESETS = {
    "sb3-td3": "TETTE",
    "sb3-sac": "TTTTE",
    "crossq": "TEEJJ",
    "ma-bn": "TTETT",
}
"""Plans by name: what Stable-Baselines3's TD3 and SAC run,
CrossQ (arXiv 1902.05605), MA-BN (arXiv 2509.23750)."""


@dataclass(frozen=True)
class Plan:
    """One mode for every slot. Hashable, so that a compiled update can take it as static.

    Build it with `Plan.parse`; index it with a `Slot`; ``str(plan)`` gives the letters back.
    """

    modes: tuple[Mode, Mode, Mode, Mode, Mode, Mode]

    @classmethod
    def parse(cls, text: str | Plan) -> Plan:
        """Read a preset's name, five letters (slots 1 to 5; slot 0 is ``E``) or six (slot 0 first).

        Raises:
            BatchproofError: unknown letter or preset, wrong length, ``J`` in only one of slots 4
                and 5 or outside them, ``M`` outside slot 3.
        """
        if isinstance(text, Plan):
            return text
        letters = PRESETS.get(text.lower(), text)
        if len(letters) not in (5, 6) or any(c.upper() not in _TITLES for c in letters):
            raise BatchproofError(
                f"unknown mode plan {text!r}: write five letters for slots 1 to 5 (for example "
                f"TEETE), six with slot 0 in front, or one of {', '.join(PRESETS)}; "
                f"the letters are {', '.join(_TITLES)}"
            )
        if len(letters) == 5:
            letters = "E" + letters
        modes = tuple(Mode(c) for c in letters)
        plan = cls(modes)  # type: ignore[arg-type]
        plan._check(text)
        return plan

    def _check(self, text: str) -> None:
        joint = {slot for slot in Slot if self[slot].kind == "J"}
        if joint and joint != {Slot.REPLAY_Q, Slot.TARGET_Q}:
            raise BatchproofError(
                f"impossible mode plan {text!r}: J joins slots 4 and 5 in one forward pass, so it "
                "must stand in both and nowhere else (for example TEEJJ)"
            )
        if joint and self[Slot.REPLAY_Q] != self[Slot.TARGET_Q]:
            raise BatchproofError(
                f"impossible mode plan {text!r}: slots 4 and 5 share one forward pass, so they "
                "must both be J or both be j"
            )
        mixed = {slot for slot in Slot if self[slot].kind == "M"} - {Slot.POLICY_Q}
        if mixed:
            raise BatchproofError(
                f"impossible mode plan {text!r}: M mixes the policy batch with the replay batch, "
                "so it can stand in slot 3 only (for example TEMTE)"
            )
        if self[Slot.ACT].kind in "S":
            raise BatchproofError(
                f"impossible mode plan {text!r}: no gradient is taken when acting, so slot 0 "
                "can be E, T, t or B, not S"
            )

    def __getitem__(self, slot: Slot) -> Mode:
        return self.modes[slot]

    @property
    def joint(self) -> bool:
        """Whether slots 4 and 5 share one forward pass."""
        return self[Slot.REPLAY_Q].kind == "J"

    def __str__(self) -> str:
        letters = "".join(mode.letter for mode in self.modes)
        return letters[1:] if letters[0] == "E" else letters
