"""The clinic: trace, audit, fix and monitor any PyTorch policy. Needs torch alone.

Start with `Subject`, then `audit` or `trace`.
"""

from batchproof.clinic.rules import Finding, Outcome, Report, Rule, Status, audit
from batchproof.clinic.subject import Subject, Transitions
from batchproof.clinic.trace import Trace, trace

__all__ = [
    "Finding",
    "Outcome",
    "Report",
    "Rule",
    "Status",
    "Subject",
    "Trace",
    "Transitions",
    "audit",
    "trace",
]
