"""``python -m batchproof``."""

from batchproof.cli import run

run()
