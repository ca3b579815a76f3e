"""The pytest plugin: a fixture that audits a policy. It imports torch only when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from batchproof.clinic import Report


@pytest.fixture
def batchproof_audit() -> Callable[..., Report]:
    """`batchproof.testing.assert_batchproof`: fails the test where a rule of the audit fails."""

    def audit(policy: Any, obs: Any = None, **options: Any) -> Report:
        from batchproof.testing import assert_batchproof

        __tracebackhide__ = True
        return assert_batchproof(policy, obs, **options)

    return audit
