"""Every agent of the lab by name: one file each, the same functions in the same order.

An agent is a module with ``STEPPER``, ``Config``, ``PRESETS``, ``State``, ``init``, ``update``,
``act`` and ``measure``.
"""

from types import ModuleType

from batchproof.lab.agents import crossq, ddpg, maddpg, reinforce, sac, td3, xqc

AGENTS: dict[str, ModuleType] = {
    "td3": td3,
    "sac": sac,
    "ddpg": ddpg,
    "crossq": crossq,
    "xqc": xqc,
    "maddpg": maddpg,
    "reinforce": reinforce,
}
