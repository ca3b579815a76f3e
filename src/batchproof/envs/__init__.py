"""Gymnasium environments; importing `batchproof.envs` registers nothing until it is asked.

Gymnasium finds them by itself through the package's entry point:
``gymnasium.make("batchproof/ConstantReward-v0")``.
"""

ENTRY_POINTS = {
    "batchproof/ConstantReward-v0": "batchproof.envs.constant_reward:ConstantRewardEnv",
}


def register_envs() -> None:
    """Register every environment of the package with Gymnasium; doing it twice changes nothing."""
    import gymnasium

    for name, entry_point in ENTRY_POINTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(id=name, entry_point=entry_point)
