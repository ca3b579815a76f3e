"""What tests of comparisons share."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchproof import compare
from batchproof.cli import parser


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], compare.Grid]:
    """The grid that a command line stands for, with nothing trained."""

    def get(words: str) -> compare.Grid:
        kept = []

        def run(spec: compare.Spec, out: Path, build: compare.Build, **_: Any) -> dict[str, Any]:
            kept.append(compare.grid(spec, build))
            return {"status": "finished", "cells": []}

        with monkeypatch.context() as patch:
            patch.setattr(compare, "run", run)
            patch.setattr(compare, "text", lambda record: "")
            args = parser().parse_args(["compare", *shlex.split(words), "--out", "never"])
            args.run(args, f"batchproof compare {words} --out never")
        return kept[0]

    return get
