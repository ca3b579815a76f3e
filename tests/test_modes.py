"""Slots, modes and plans against the table in the design."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproof.errors import BatchproofError
from batchproof.modes import PRESETS, B, E, Mode, Plan, S, Slot, T

ACTING = st.sampled_from("ETtB")
ANY = st.sampled_from("TESBtesb")
POLICY_Q = st.sampled_from("TESBMtesbm")
CRITIC_PAIR = st.one_of(st.tuples(ANY, ANY), st.sampled_from([("J", "J"), ("j", "j")]))


def spelled(letters):
    """E and B have nothing to leave alone, so they have one spelling."""
    return letters.replace("e", "E").replace("b", "B")


@st.composite
def valid_letters(draw):
    """Six letters that make a possible plan, slot 0 first."""
    replay, target = draw(CRITIC_PAIR)
    return draw(ACTING) + draw(ANY) + draw(ANY) + draw(POLICY_Q) + replay + target


@given(valid_letters())
@settings(deadline=None, database=None)
def test_parse_and_format_are_inverse(letters):
    plan = Plan.parse(letters)
    letters = spelled(letters)
    assert [plan[slot].letter for slot in Slot] == list(letters)
    assert Plan.parse(str(plan)) == plan
    assert str(plan) == (letters[1:] if letters[0] == "E" else letters)
    assert hash(Plan.parse(str(plan))) == hash(plan)


@given(valid_letters())
@settings(deadline=None, database=None)
def test_slot_0_is_running_unless_given(letters):
    plan = Plan.parse(letters[1:])
    assert plan[Slot.ACT] == E
    assert plan.modes[1:] == Plan.parse(letters).modes[1:]


def test_slots_are_numbered_after_the_paper():
    names = ["ACT", "ACTOR_UPDATE", "TARGET_ACTION", "POLICY_Q", "REPLAY_Q", "TARGET_Q"]
    assert [slot.name for slot in Slot] == names
    assert [int(slot) for slot in Slot] == [0, 1, 2, 3, 4, 5]
    assert Slot.POLICY_Q.title == "critic on (s, pi(s)), in the actor's loss"
    assert len({slot.title for slot in Slot}) == 6


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("sb3-td3", "TETTE"),
        ("sb3-sac", "TTTTE"),
        ("crossq", "TEEJJ"),
        ("ma-bn", "TTETT"),
        ("CrossQ", "TEEJJ"),
    ],
)
def test_presets(name, letters):
    assert Plan.parse(name) == Plan.parse(letters)
    assert str(Plan.parse(name)) == letters


def test_there_are_no_other_presets():
    assert set(PRESETS) == {"sb3-td3", "sb3-sac", "crossq", "ma-bn"}


def test_parsing_a_plan_gives_it_back():
    plan = Plan.parse("TEMTE")
    assert Plan.parse(plan) is plan


def test_joint_only_with_j():
    assert Plan.parse("TEEJJ").joint
    assert Plan.parse("TEEjj").joint
    assert not Plan.parse("TEETT").joint


# What the message must name besides the plan itself: the cause, and a plan to write instead.
IMPOSSIBLE = {
    "TETJE": ("J", "slots 4 and 5", "TEEJJ"),
    "TETTJ": ("J", "slots 4 and 5", "TEEJJ"),
    "TETjE": ("J", "slots 4 and 5", "TEEJJ"),
    "JEEJJ": ("J", "nowhere else", "TEEJJ"),
    "TEJJJ": ("J", "nowhere else", "TEEJJ"),
    "JTEEJJ": ("J", "nowhere else", "TEEJJ"),
    "TEEJj": ("both be J or both be j",),
    "TEEjJ": ("both be J or both be j",),
    "METTE": ("M", "slot 3", "TEMTE"),
    "TMTTE": ("M", "slot 3", "TEMTE"),
    "TETME": ("M", "slot 3", "TEMTE"),
    "TETTm": ("M", "slot 3", "TEMTE"),
    "MTETTE": ("M", "slot 3", "TEMTE"),
    "STETTE": ("slot 0", "E, T, t or B"),
    "sTETTE": ("slot 0", "E, T, t or B"),
    "TEXTE": ("five letters", "T, E, S, J, M, B", "sb3-td3"),
    "TETT": ("five letters", "sb3-td3"),
    "TETTETE": ("five letters", "sb3-td3"),
    "": ("five letters", "sb3-td3"),
    "sb3-ppo": ("five letters", "sb3-td3"),
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_plan_says_what_to_write_instead(text):
    with pytest.raises(BatchproofError) as caught:
        Plan.parse(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "\n" not in message
    for part in IMPOSSIBLE[text]:
        assert part in message


@given(st.text("TESBJMtesbjmX", min_size=4, max_size=7))
@settings(deadline=None, database=None, max_examples=300)
def test_every_text_is_a_possible_plan_or_an_error(text):
    """Exactly the plans of the design's rules are accepted."""
    letters = text if len(text) == 6 else "E" + text
    joint = [i for i, c in enumerate(letters) if c in "Jj"]
    possible = (
        len(letters) == 6
        and "X" not in letters
        and letters[0] not in "Ss"
        and all(i == Slot.POLICY_Q for i, c in enumerate(letters) if c in "Mm")
        and (not joint or joint == [4, 5])
        and (not joint or letters[4] == letters[5])
    )
    if possible:
        assert [mode.letter for mode in Plan.parse(text).modes] == list(spelled(letters))
    else:
        with pytest.raises(BatchproofError):
            Plan.parse(text)


@pytest.mark.parametrize(
    ("letter", "uses_batch", "gradient", "updates", "bypass"),
    [
        ("T", True, True, True, False),
        ("E", False, False, False, False),
        ("S", True, False, True, False),
        ("J", True, True, True, False),
        ("M", True, True, True, False),
        ("B", False, False, False, True),
    ],
)
def test_letters_follow_the_table(letter, uses_batch, gradient, updates, bypass):
    mode = Mode(letter)
    lower = Mode(letter.lower())
    assert (mode.uses_batch, mode.gradient, mode.updates, mode.bypass) == (
        uses_batch,
        gradient,
        updates,
        bypass,
    )
    # A lower-case letter is the same mode with the running statistics left alone.
    assert (lower.uses_batch, lower.gradient, lower.updates, lower.bypass) == (
        uses_batch,
        gradient,
        False,
        bypass,
    )
    assert mode.kind == lower.kind == letter
    assert str(mode) == letter
    assert str(lower) == spelled(letter.lower())
    assert lower.title.startswith(mode.title)
    assert ("left alone" in lower.title) == uses_batch


@pytest.mark.parametrize("letter", ["X", "", "TT", "TE", " ", "1"])
def test_unknown_mode_names_the_letters(letter):
    with pytest.raises(BatchproofError, match="T, E, S, J, M, B") as caught:
        Mode(letter)
    assert repr(letter) in str(caught.value)


def test_plans_and_modes_are_dictionary_keys():
    assert {Plan.parse("sb3-td3"): 1}[Plan.parse("TETTE")] == 1
    assert len({T, E, S, B, Mode("T"), Mode("t")}) == 5
    assert Plan.parse("TETTE") != Plan.parse("TETTT")


def test_importing_modes_needs_neither_jax_nor_torch():
    """The vocabulary belongs to both halves, so it must import where either is missing."""
    code = (
        "import sys\n"
        "sys.modules['jax'] = sys.modules['torch'] = None\n"  # importing them now raises
        "from batchproof.modes import Plan\n"
        "print(Plan.parse('crossq'))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "TEEJJ"
