"""Every planted defect is found with its code and layer; no healthy policy fails a rule."""

import importlib.util
from pathlib import Path

import pytest

from batchproof.clinic.rules import Status, audit
from batchproof.clinic.subject import fingerprint

_path = Path(__file__).resolve().parents[2] / "benchmarks" / "planted_defects.py"
_spec = importlib.util.spec_from_file_location("planted_defects", _path)
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)
PLANTED, HEALTHY = corpus.planted(), corpus.healthy()


def test_the_corpus_is_large_enough():
    assert len(PLANTED) >= 20
    assert len(HEALTHY) >= 20
    families = {code[2] for _, code, _ in PLANTED.values()}
    assert families == set("123456")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defect_is_found(name):
    build, code, layer = PLANTED[name]
    subject = build()
    before = fingerprint(subject)
    outcome = audit(subject, only=[code]).outcomes[code]
    assert outcome.status in (Status.FAIL, Status.REVIEW), outcome.reason
    assert corpus.names_layer(outcome, layer), outcome.findings
    assert fingerprint(subject) == before


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_policy_fails_no_rule(name):
    subject = HEALTHY[name]()
    before = fingerprint(subject)
    report = audit(subject)
    assert {c: o.findings for c, o in report.outcomes.items() if o.status is Status.FAIL} == {}
    assert fingerprint(subject) == before
