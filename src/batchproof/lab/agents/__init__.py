"""Every agent of the lab by name: one file each, the same functions in the same order.

An agent is a module with ``Config``, ``State``, ``init``, ``update``, ``act`` and ``measure``.
"""

from types import ModuleType

from batchproof.lab.agents import sac, td3

AGENTS: dict[str, ModuleType] = {"td3": td3, "sac": sac}
