"""Every agent of the lab by name: one file each, the same functions in the same order.

An agent is a module with ``STEPPER``, ``MULTI_AGENT``, ``Config``, ``PRESETS``, ``TRAINING``,
``State``, ``init``, ``update`` and ``act``. One that replays has ``measure`` too, and may have
``observe``, which sees each reward as it comes (XQC's scale of returns).
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
