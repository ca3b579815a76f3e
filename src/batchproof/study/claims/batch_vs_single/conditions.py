"""What is run, what was predicted, and the bounds of the decision rules: written before the run."""

from __future__ import annotations

from dataclasses import dataclass

from batchproof.lab.agents import ddpg
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.modes import B, E, Mode, Plan, T
from batchproof.study.conditions import choose

ARTICLE = "question-and-answer article on batch norm in reinforcement learning"
NOTEBOOK = "course-project notebook (DDPG and MADDPG, tennis)"

# What is run.
HIDDEN = (64, 64)
BATCH_SIZE = 128
PLAN = "TTETT"  # MA-BN's (arXiv 2509.23750), which learns this task; slot 0 is the condition's
STARTS = 256  # environment steps with uniform actions
EVALUATIONS = 10
EPISODES = 64  # episodes of each measurement of a policy
GROUPS = (1, 2, 8, 32)  # environments in a batch, for trained actors that act in T
SIZES = (2, 8, 32, 128, 512)  # rows of a batch, for the gap of one pass
POPULATION = 4096  # visited states that stand for all of them
PROBES, DRAWS = 64, 16  # states whose gap is measured, and batches for each
SYNC_SIZES = (8, 32, 128)  # rows in both processes together

# The TD error at fixed weights, by the modes of slots 2, 4 and 5.
TD_PLANS = {
    "EEE": "E in slots 2, 4, 5",
    "ETE": "Stable-Baselines3: slot 4 in T",
    "TTT": "train mode everywhere",
    "BTB": "skipped in the targets",
}

# Bounds of the decision rules.
FLOORS = {"float32": 1e-5, "float64": 1e-13}  # rounding of an action in [-1, 1], with room
SEEN = 100.0  # a gap is one of normalization, not rounding, above this many times the floor
EXPONENT = (-0.6, -0.4)  # "about 1 / sqrt(N)"
REMOVED, KEPT = 0.1, 0.5  # SyncBN removed the gap, or left it: share of the gap without it
WRONG_TD = 0.1  # measurable: share of the TD error's own size
# Classes of a return on Pendulum-v1, for predictions: about -150 is the best, -1200 is random.
LEARNED, FAILED = -250.0, -700.0


@dataclass(frozen=True)
class Condition:
    """One way to normalize and to act while training.

    Attributes:
        key: its name.
        label: what a reader sees.
        norm: of actor and critic, before each activation.
        act: the mode of slot 0.
        num_envs: environments stepped together; in ``T`` they share one batch.
        predicted: final return of the policy deployed alone in ``E``, written before the run.
    """

    key: str
    label: str
    norm: Norm
    act: Mode
    num_envs: int
    predicted: float


BATCH, LAYER, NONE = Norm("batch"), Norm("layer"), Norm()
CONDITIONS = (
    Condition("act-E", "batch norm, acts alone in E", BATCH, E, 8, -160.0),
    Condition("act-T", "batch norm, acts in T in a batch of 8", BATCH, T, 8, -170.0),
    Condition("act-T-2", "batch norm, acts in T in a batch of 2", BATCH, T, 2, -400.0),
    Condition("act-T-32", "batch norm, acts in T in a batch of 32", BATCH, T, 32, -165.0),
    Condition("act-T-1", "batch norm, acts in T, a batch of one", BATCH, T, 1, -1100.0),
    Condition("act-B", "batch norm, skipped when acting", BATCH, B, 8, -300.0),
    Condition("layer", "layer norm", LAYER, E, 8, -160.0),
    Condition("none", "no norm", NONE, E, 8, -160.0),
)
DEFAULT = ("act-E", "act-T", "layer")

# The ways in which a trained actor of act-E then acts: a mode, and how many share a batch.
WAYS = {
    "E": "alone in E",
    "T1": "in T alone",
    "T2": "in T, a batch of 2",
    "T8": "in T, a batch of 8",
    "T32": "in T, a batch of 32",
    "B": "alone in B",
}
# Its return when it acts so, written before the run.
PREDICTED_ACTING = {"T1": -1200.0, "T2": -800.0, "T8": -300.0, "T32": -180.0, "B": -400.0}


def chosen(names: str | None) -> tuple[Condition, ...]:
    """The conditions that ``--conditions`` names and act-E, in the order of `CONDITIONS`.

    Raises:
        BatchproofError: an unknown name.
    """
    named = choose(CONDITIONS, DEFAULT, names)
    return tuple(c for c in CONDITIONS if c in named or c.key == "act-E")


def config_of(condition: Condition) -> ddpg.Config:
    """DDPG as every condition runs it."""
    mlp = MLP(HIDDEN, condition.norm)
    plan = Plan.parse(condition.act.letter + PLAN)
    return ddpg.Config(actor=mlp, critic=mlp, plan=plan, batch_size=BATCH_SIZE)
