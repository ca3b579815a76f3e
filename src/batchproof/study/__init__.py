"""Studies: public claims about normalization in RL, each settled by one command.

A study's module, one file each under `batchproof.study.claims`, has a ``run`` function; this table
is read by the command line and imports nothing heavy.
"""

from typing import NamedTuple


class Study(NamedTuple):
    """What the command line needs to know of a study."""

    summary: str
    module: str


STUDIES = {
    "constant-reward": Study(
        "a blog post: TD3 and SAC with batch norm cannot learn that the reward is the action",
        "batchproof.study.claims.constant_reward",
    ),
}
