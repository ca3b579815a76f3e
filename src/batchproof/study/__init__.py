"""Studies: public claims about normalization in RL, each settled by one command.

A study's module, a file or a package under `batchproof.study.claims`, has a function
``run(out, *, seeds, steps, quick, conditions, progress, command)`` with None for what was not
given, and keywords of its own where its row says so; it returns the content of ``study.json``. This
table is read by the command line and imports nothing heavy.
"""

from typing import NamedTuple


class Study(NamedTuple):
    """What the command line needs to know of a study."""

    summary: str
    module: str
    options: tuple[str, ...] = ()  # beyond those of every study


STUDIES = {
    "constant-reward": Study(
        "a blog post: TD3 and SAC with batch norm cannot learn that the reward is the action",
        "batchproof.study.claims.constant_reward",
        options=("ending",),
    ),
    "batch-vs-single": Study(
        "two texts: with batch norm the same state acts differently in a batch and alone",
        "batchproof.study.claims.batch_vs_single",
    ),
    "momentum-outliers": Study(
        "a forum thread: a linear policy with batch norm trains in train mode and fails in eval",
        "batchproof.study.claims.momentum_outliers",
    ),
    "maddpg-batchnorm": Study(
        "a course notebook: batch norm skipped when acting keeps two agents from their task",
        "batchproof.study.claims.maddpg_batchnorm",
    ),
    "naturecnn-breakout": Study(
        "a feature request: PPO on Breakout learns faster with batch norm in NatureCNN",
        "batchproof.study.claims.naturecnn_breakout",
        options=("budget",),
    ),
    "kappa-predicts": Study(
        "an open question: does a critic that is blind to common shifts mean failure on any task?",
        "batchproof.study.claims.kappa_predicts",
    ),
    "best-plan": Study(
        "an open question: is there a mode plan better than those of CrossQ and MA-BN?",
        "batchproof.study.claims.best_plan",
    ),
    "crossq-joint": Study(
        "a pull request asks: why does CrossQ need one joint forward pass?",
        "batchproof.study.claims.crossq_joint",
    ),
    "pendulum-swingup": Study(
        "an open question: which part of XQC keeps it from swinging a pendulum up?",
        "batchproof.study.claims.pendulum_swingup",
    ),
    "hopper-decay": Study(
        "an open question: why does CrossQ get worse on Hopper, and which switch cures it?",
        "batchproof.study.claims.hopper_decay",
        options=("width",),
    ),
}
