"""`batchproof modes`."""

from __future__ import annotations

import argparse
from typing import Any

from batchproof.cli import words
from batchproof.modes import PRESETS, Mode, Slot


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "modes", help="show slots, modes and named plans", allow_abbrev=False
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, command: str) -> int:
    """Run the command; ``command`` is what was typed."""
    print("Slots: the passes of an off-policy actor-critic update; acting is slot 0\n")
    for slot in Slot:
        print(f"  {slot.value}  {slot.name.lower():<14} {slot.title}")
    print("\nModes: the statistics that a normalized network uses in one pass\n")
    for letter in words.LETTERS:
        print(f"  {letter}  {Mode(letter).title}")
    print("\n  A lower-case letter leaves the running statistics alone.")
    print("\nPlans: five letters for slots 1 to 5 (slot 0 is E), or six with slot 0 in front\n")
    for name, letters in PRESETS.items():
        print(f"  {name:<8} {letters}")
    return 0
