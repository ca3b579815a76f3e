"""Comparisons: algorithms x environments x norms x placements x mode plans x seeds, in one folder.

A *condition* is what is compared: everything but environment and seeds. It is written as options of
``batchproof train``, so that all that `train` can do can be compared, and what it refuses is left
out with its own reason. A *cell* is a condition on an environment. Its seeds train in one or more
*populations*, each a run folder of its own: ``OUT/cells/ENVIRONMENT/CONDITION/SEEDS``.

Populations are found again by what they hold, not by their name. So a comparison that was stopped
continues, and one that gets more conditions or seeds runs only those. All conditions have the same
seeds, so comparisons are paired.

Read in this order: `conditions` (what is compared; `toml_file` reads it from a file),
`populations` (what has to be trained for it, in which order), `work` (one population), `running`
(all of them; `on_ray` on a cluster), `summary` (what is said and kept of them). `table` shows them.
"""

from batchproof.compare.conditions import (
    DEFAULT,
    Build,
    Condition,
    Grid,
    Option,
    Spec,
    grid,
    heads,
)
from batchproof.compare.populations import Cell, Population, cells, ordered
from batchproof.compare.running import listing, run
from batchproof.compare.summary import text
from batchproof.compare.toml_file import read_file

__all__ = [
    "DEFAULT",
    "Build",
    "Cell",
    "Condition",
    "Grid",
    "Option",
    "Population",
    "Spec",
    "cells",
    "grid",
    "heads",
    "listing",
    "ordered",
    "read_file",
    "run",
    "text",
]
