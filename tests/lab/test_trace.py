"""The trace of the lab's own agents: letters, rows and targets, found, not read from the plan."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from batchproof.errors import BatchproofError
from batchproof.lab import nets
from batchproof.lab import trace as module
from batchproof.lab.agents import crossq, ddpg, maddpg, reinforce, sac, td3, xqc
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.trace import Trace, behaviour, trace
from batchproof.lab.training import Training
from batchproof.modes import Mode, Plan

ID = "batchproof/ConstantReward-v0"
BATCH = MLP((8,), Norm("batch"))
ROWS = 12


def small(agent, plan: str, **options):
    both = {"actor": BATCH, "critic": BATCH} | options
    return replace(agent.Config(), plan=Plan.parse(plan), batch_size=ROWS, **both)


CASES = {
    "td3": ("td3", small(td3, "TETTE"), ID),
    "stale": ("td3", small(td3, "TSEMtT", target_stats="stale"), ID),
    "sac": ("sac", small(sac, "TTETT", target_stats="polyak"), ID),
    "crossq": ("crossq", small(crossq, "TEEJJ", critic=MLP((8,), Norm("renorm"))), ID),
    "xqc": ("xqc", small(xqc, "tEEjj", atoms=5), ID),
    "bypass": ("ddpg", small(ddpg, "TEBTE", actor=MLP((8,), Norm("layer"))), ID),
    "rally": ("maddpg", small(maddpg, "TETTE"), "batchproof/Rally-v0"),
    "shared": ("maddpg", small(maddpg, "TETJJ", share_parameters=True), "batchproof/Rally-v0"),
    "episodes": (
        "reinforce",
        reinforce.Config(actor=BATCH, plan=Plan.parse("tTEEEE"), episodes_per_update=4),
        ID,
    ),
}


@cache
def traced(case: str) -> Trace:
    algo, config, env_id = CASES[case]
    return trace(Training(algo, config, env_id, steps=500))


def rows_of(found: Trace) -> set[tuple[tuple[int, ...], str, int, str]]:
    return {(call.slots, call.network, call.rows, call.mode) for call in found.calls}


@pytest.mark.parametrize("case", CASES)
def test_the_letters_found_are_the_plan(case):
    found = traced(case)
    without = {"bypass": "--BTE", "episodes": "tT----"}
    assert found.plan == without.get(case, str(CASES[case][1].plan))
    assert found.asked == str(CASES[case][1].plan)


@pytest.mark.parametrize("case", ["td3", "crossq", "rally", "shared"])
def test_what_moved_is_what_a_plain_update_moves(case):
    found = traced(case)
    moving = {call.network for call in found.calls if call.moved and 0 not in call.slots}
    # Targets also receive statistics, from the online networks.
    online = {name for name, layers in found.moved.items() if layers and "_target" not in name}
    assert online == {name for name in moving if "_target" not in name}
    assert online == {name for name in found.moved if "_target" not in name}


def test_an_update_that_moves_nothing_is_said_to_move_nothing():
    found = traced("xqc")
    assert not any(call.moved for call in found.calls)
    assert not any(found.moved.values())
    assert set(found.synced["critic_target"].values()) == {"equal, nothing moved"}


def test_td3_passes_have_the_rows_and_networks_of_the_algorithm():
    assert rows_of(traced("td3")) == {
        ((0,), "actor", 1, "E"),
        ((1,), "actor", ROWS, "T"),
        ((2,), "actor_target", ROWS, "E"),
        ((3,), "critic", ROWS, "T"),
        ((4,), "critic", ROWS, "T"),
        ((5,), "critic_target", ROWS, "E"),
    }
    assert set(traced("td3").synced["critic_target"].values()) == {"synced"}


def test_joint_and_mixed_passes_have_twice_the_rows():
    assert ((4, 5), "critic", 2 * ROWS, "J") in rows_of(traced("crossq"))
    assert ((3,), "critic", 2 * ROWS, "M") in rows_of(traced("stale"))
    both = {((4,), "critic", 2 * ROWS, "j"), ((5,), "critic_target", 2 * ROWS, "j")}
    assert both <= rows_of(traced("xqc"))


def test_agents_are_told_apart_unless_they_share():
    networks = {call.network for call in traced("rally").calls if 1 in call.slots}
    assert len(networks) == 2
    assert all(name.startswith("actor/") for name in networks)
    shared = {call for call in traced("shared").calls if 1 in call.slots}
    assert {(call.network, call.rows) for call in shared} == {("actor", 2 * ROWS)}
    joint = {call for call in traced("shared").calls if 4 in call.slots}
    assert {(call.network, call.rows) for call in joint} == {("critic", 4 * ROWS)}


def test_what_targets_receive():
    assert set(traced("stale").synced["critic_target"].values()) == {"moved by its own passes"}
    polyak = traced("sac").synced["critic_target"]
    assert polyak["norm_pre_0.count"] == "synced"
    # Its own passes in mode T and the average: neither alone.
    assert polyak["norm_pre_0.mean"] == "moved by its own passes"


def test_a_norm_of_single_rows_has_no_letter_and_a_skipped_one_has():
    found = traced("bypass")
    assert {(c.mode, c.norm) for c in found.calls if 1 in c.slots} == {("-", "layer")}
    assert {c.mode for c in found.calls if 3 in c.slots} == {"B"}


def test_without_norms_passes_are_still_listed():
    found = trace(Training("td3", small(td3, "TETTE", actor=MLP((8,)), critic=MLP((8,))), ID))
    assert found.plan == "-----"
    assert {call.slots for call in found.calls} == {(i,) for i in range(6)}
    assert "-  " in str(found)


def test_text_and_json_hold_the_same_calls():
    found = traced("crossq")
    text, data = str(found), found.to_json()
    assert text.splitlines()[0] == "plan TEEJJ (configured: TEEJJ)"
    assert len(data["calls"]) == len(found.calls)
    assert "4+5   critic   norm_pre_0  renorm  24    J     yes    yes" in text


@pytest.mark.parametrize("kind", ["batch", "renorm"])
@pytest.mark.parametrize("letter", list("TtESsB"))
def test_behaviour_is_measured(kind, letter):
    mode = Mode(letter)
    did = behaviour(Norm(kind), mode)
    assert did.letter == letter
    assert did.moved == mode.updates
    # Renorm in S keeps the gradient of a row to itself alone, as batch norm.
    assert did.gradient == (mode.gradient and mode.uses_batch)


def test_the_trace_leaves_no_watcher_behind():
    with pytest.raises(BatchproofError, match="unknown environment"):
        trace(Training("td3", small(td3, "TETTE"), "Nowhere-v0"))
    traced("td3")
    assert nets.WATCHERS == []


def test_the_calls_are_those_that_a_plain_update_counts():
    algo, config, env_id = CASES["td3"]
    state = module._compiled(lambda key: td3.init(config, key, 1, 1))(jax.random.key(0))
    batch = module._batch(Training(algo, config, env_id), None, 1, 1)
    update = module._compiled(lambda *given: td3.update(config, *given, jax.random.key(0), 2)[0])
    plain = update(state, batch)
    before, after = (np.asarray(s.critic.stats["norm_pre_0"]["count"]) for s in (state, plain))
    # Slot 4 moves the statistics of both critics, slot 3 those of the first one.
    assert (after - before).tolist() == [2, 1]
    moving = [call.slots for call in traced("td3").calls if call.moved and call.network == "critic"]
    assert moving == [(3,), (4,)]
