"""Audits inside other people's test suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchproof.clinic import Report, Subject


def assert_batchproof(
    policy: Any,
    obs: Any = None,
    *,
    only: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
) -> Report:
    """Assert that no rule of an audit fails. The policy is bit-identical afterwards.

    Args:
        policy: a `batchproof.clinic.Subject`; a torch module, or any function, from observations
            (B, ...) to actions, logits or Q-values (B, K); a Stable-Baselines3 model.
        obs: observations (N, ...), N >= 2, as a tensor or array, or a dictionary of them. A
            subject has its own; a model is asked for those in its replay or rollout buffer.
            Floating ones are cast to the type of the networks' parameters.
        only: codes or prefixes (``BP3``) to run, or a single one; None runs all.
        ignore: codes or prefixes to leave out, or a single one.

    Returns:
        The report, for what should be reviewed and what was skipped.

    Raises:
        AssertionError: a rule failed; the message is the text report.
        BatchproofError: bad observations, a policy that cannot take them, or an unknown code.
    """
    from batchproof.clinic import formats
    from batchproof.clinic.rules import audit

    __tracebackhide__ = True
    report = audit(_subject(policy, obs), only=only, ignore=ignore)
    if not report.clean:
        raise AssertionError(formats.text(report))
    return report


def _subject(policy: Any, obs: Any) -> Subject:
    from dataclasses import replace

    from torch import nn

    from batchproof.clinic import Subject
    from batchproof.clinic.subject import as_parameters
    from batchproof.errors import BatchproofError

    given = None if obs is None else _tensors(obs)
    if isinstance(policy, Subject):
        if given is None:
            return policy
        return replace(policy, obs=as_parameters(given, *policy.networks.values()))
    if not isinstance(policy, nn.Module) and hasattr(policy, "policy"):
        from batchproof.sb3 import subject_from_model

        return subject_from_model(policy, given)
    if given is None:
        raise BatchproofError(
            "assert_batchproof needs observations: write assert_batchproof(policy, obs)"
        )
    build: Callable[..., Subject] = (
        Subject.from_module if isinstance(policy, nn.Module) else Subject.from_callable
    )
    return build(policy, given, name=type(policy).__name__)


def _tensors(obs: Any) -> Any:
    import torch

    from batchproof.errors import BatchproofError

    try:
        if isinstance(obs, Mapping):
            return {key: torch.as_tensor(part) for key, part in obs.items()}
        return torch.as_tensor(obs)
    except (TypeError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:120]
        raise BatchproofError(
            f"the observations are no array of numbers (N, ...), or a dictionary of such: {line}"
        ) from error
