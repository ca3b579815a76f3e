"""The pixel study: its rules on made-up results, its cells, and a tiny real run."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from batchproof import BatchproofError, records
from batchproof.study import STUDIES, pixels
from batchproof.study.claims import naturecnn_breakout as study
from batchproof.study.pixels import Cell, Result

BY_KEY = {condition.key: condition for condition in study.CONDITIONS}
STEPS = 200_000
POINTS = np.arange(10_000, STEPS + 1, 10_000)
TINY = {"n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 2, "games": 2}


def result(
    score: float, early: float, *, fall: float = 0.0, cpu: float = 2.0, kl: float = 0.01
) -> Result:
    """A seed whose curve stays at ``early`` for half of the run and then at ``score``."""
    curve = np.where(STEPS / 2 >= POINTS, early, score).astype(float)
    curve[-2] -= fall * score
    columns = {
        "step": POINTS.astype(float),
        "score": curve,
        "games": np.full(len(POINTS), 100.0),
        "first_kl": np.full(len(POINTS), kl),
        "first_clip_fraction": np.full(len(POINTS), 10 * kl),
        "first_ratio_error": np.full(len(POINTS), 20 * kl),
        "update_cpu_s": np.full(len(POINTS), cpu),
    }
    return Result(columns, {"score": score, "wall_s": 10.0, "clinic": {}})


def outcome(finals: dict[str, float], seeds: int = 5, **of: dict[str, float]) -> study.Outcome:
    """Every seed of a condition near one score; ``of``: other figures by condition."""
    results = {}
    for key, score in finals.items():
        more = {name: values[key] for name, values in of.items() if key in values}
        early = more.pop("early", score / 2)
        for seed, noise in enumerate(np.linspace(-0.5, 0.5, seeds)):
            figures = {name: value * (1 + 0.02 * noise) for name, value in more.items()}
            results[f"{key}-seed{seed}"] = result(score + noise, early + noise / 4, **figures)
    conditions = tuple(BY_KEY[key] for key in finals)
    return study.Outcome(conditions, dict.fromkeys(finals, seeds), STEPS, results)


def verdicts(made: study.Outcome) -> dict[str, str]:
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


SCORES = {
    "none": 9.0, "bn": 6.0, "layer": 10.0, "group": 10.0, "none-short": 8.0, "bn-short": 5.0,
    "none-lr4": 8.0, "bn-lr4": 3.0,
}  # fmt: skip
FALLS = {"bn": 0.3, "group": 0.1}


def test_the_predicted_results_give_the_predicted_verdicts():
    assert verdicts(outcome(SCORES, fall=FALLS)) == study.PREDICTED


@pytest.mark.parametrize(
    ("claim", "scores", "of", "verdict"),
    [
        ("E1", {"bn": 18.0}, {}, "supported"),
        ("E1", {"bn-short": 18.0}, {}, "supported"),
        ("E1", {"bn": study.REACHED}, {}, "inconclusive"),
        ("E2", {"bn": 15.0, "bn-short": 15.0}, {}, "supported"),
        ("E2", {"bn": 15.0}, {}, "inconclusive"),
        ("E2", {"bn": 15.0, "bn-short": 15.0}, {"early": {"bn": 1.0, "bn-short": 1.0}}, "refuted"),
        ("E3", {"layer": 3.0}, {}, "supported"),
        ("E3", {"layer": 6.0}, {}, "inconclusive"),
        ("E4", {}, {"fall": {"bn": 0.1, "group": 0.3}}, "refuted"),
        ("E4", {}, {"fall": FALLS, "cpu": {"group": 3.0}}, "refuted"),
        ("E4", {}, {"fall": FALLS, "cpu": {"group": 2.2}}, "supported"),
        ("E4", {}, {"fall": {"bn": 0.2, "group": 0.2}}, "inconclusive"),
        ("E5", {"bn-lr4": 6.0, "none-lr4": 2.0}, {}, "supported"),
        ("E5", {"bn-lr4": 5.0}, {}, "inconclusive"),
    ],
)
def test_each_rule_can_go_the_other_way(claim, scores, of, verdict):
    assert verdicts(outcome(SCORES | scores, **({"fall": FALLS} | of)))[claim] == verdict


def test_no_verdict_on_few_seeds():
    found = verdicts(outcome(SCORES, seeds=2, fall=FALLS))
    assert set(found.values()) == {"inconclusive"}
    found = verdicts(outcome(SCORES, seeds=3, fall=FALLS))
    assert found["E1"] == found["E2"] == "inconclusive"
    assert found["E3"] == "refuted"


def test_one_schedule_can_support_e1_and_refutes_nothing():
    claims = {claim["id"]: claim for claim in study.judge(outcome({"none": 9.0, "bn": 6.0}))}
    for id_ in ("E1", "E2"):
        assert claims[id_]["verdict"] == "inconclusive"
        assert study.ONE_SCHEDULE in claims[id_]["why"]
    found = verdicts(outcome({"none": 9.0, "bn": 18.0}))
    assert (found["E1"], found["E2"]) == ("supported", "inconclusive")


def test_missing_conditions_are_named():
    claims = {claim["id"]: claim for claim in study.judge(outcome({"none": 9.0, "bn": 6.0}))}
    assert claims["E3"]["verdict"] == "inconclusive"
    assert "layer" in claims["E3"]["why"]


def test_figures_of_a_curve():
    made = outcome({"bn": 8.0}, seeds=1, early={"bn": 2.0}, fall={"bn": 0.25})
    record = made.results["bn-seed0"]
    assert made.early("bn")[0] == pytest.approx(record.metrics["score"][0])
    # 200,000 frames are 50,000 agent steps.
    assert made.at_frames("bn")[0] == record.metrics["score"][list(POINTS).index(50_000)]
    best = record.metrics["score"].max()
    assert made.fall("bn")[0] == pytest.approx((best - record.metrics["score"][-2]) / best)


def test_points_of_too_few_games_do_not_count_as_falls():
    made = outcome({"bn": 8.0, "group": 8.0}, seeds=3)
    for found in made.results.values():
        found.metrics["games"][:] = 99
    assert np.isnan(made.fall("bn")).all()
    assert verdicts(made)["E4"] == "inconclusive"


def test_scores_before_the_first_game_count_as_nothing():
    made = outcome({"bn": 8.0}, seeds=1, early={"bn": 2.0})
    curve = made.results["bn-seed0"].metrics["score"]
    expected = curve[1:10].sum() / 10
    curve[0] = np.nan
    assert made.early("bn")[0] == pytest.approx(expected)


def test_cures_are_ranked_and_held_against_the_library():
    found = study.cures(outcome({"bn": 6.0, "bn-mdr": 9.0, "bn-frozen": 12.0}))
    assert [row["name"] for row in found] == ["bn-frozen", "bn-mdr"]
    mean, low, high = found[0]["minus_bn"]
    assert low < mean < high
    assert mean == pytest.approx(6.0, abs=0.5)
    assert "minus_none" not in found[0]


def test_bfloat16_is_held_against_float32():
    made = outcome({"none": 9.0, "none-bf16": 8.0}, cpu={"none": 2.0, "none-bf16": 1.0})
    found = study.bfloat16(made)
    assert found["final"][1] < found["final"][0] < found["final"][2]
    assert found["final"][0] == pytest.approx(-1.0, abs=0.5)
    assert found["early"][0] == pytest.approx(-0.5, abs=0.2)
    assert found["update_cpu_factor"][0] == pytest.approx(0.5, abs=0.05)
    assert study.bfloat16(outcome({"none": 9.0})) is None


def test_all_conditions_leave_out_what_a_cpu_would_emulate(tmp_path, monkeypatch):
    asked = []

    def run_cells(cells, *_args, **_options):
        asked.append({cell.name.rsplit("-seed", 1)[0] for cell in cells})
        return {}

    monkeypatch.setattr(study, "run_cells", run_cells)
    for has in (True, False):
        monkeypatch.setattr(study.cpu, "has_bfloat16", lambda has=has: has)
        with pytest.raises(BatchproofError, match="--budget"):
            study.run(tmp_path, conditions="all", progress=False)
    assert asked[0] - asked[1] == {"none-bf16"}
    assert asked[0] == set(BY_KEY)


def test_conditions_differ_and_cover_every_cure():
    cells = [replace(study.cell_of(c, 0, STEPS), name="") for c in study.CONDITIONS]
    assert len(set(cells)) == len(study.CONDITIONS)
    from batchproof.sb3.on_policy import HOW

    assert {c.how for c in study.CONDITIONS} == set(HOW)
    seeds = {c.key: c.seeds for c in study.CONDITIONS}
    assert seeds["none"] == seeds["bn"] == seeds["bn-preserved"] == 5
    assert min(seeds.values()) == 3


def test_a_panel_that_shows_nothing_new_is_left_out():
    made = outcome({"none": 9.0, "bn": 6.0, "bn-mdr": 7.0})
    titles = [panel.title for panel in study._panels(made, "score")]
    assert titles == [study._PANELS[0][0], study._PANELS[1][0]]
    made = outcome({"none": 9.0, "bn": 6.0, "none-bf16": 9.0})
    titles = [panel.title for panel in study._panels(made, "score")]
    assert titles == [study._PANELS[0][0], "Reduced precision"]


def test_findings_in_a_line():
    clinic = {
        "outcomes": {"BP205": "fail", "BP101": "pass", "BP201": "review", "BP403": "review"},
        "channels_off": {"a": 1, "b": 2},
        "channels": {"a": 32, "b": 64},
    }
    expected = "BP205 fail; BP201, BP403 review; 3 of 96 channels off"
    assert study._findings(clinic) == expected
    assert study._findings(clinic | {"outcomes": {}, "channels": {}}) == "nothing found"


def test_every_condition_is_drawn_and_no_two_lines_of_a_panel_look_alike():
    assert set(study._DRAWN) == set(BY_KEY)
    drawn = [keys for _, keys in study._PANELS] + [("none", "bn", *study.CURES)]
    assert {key for keys in drawn for key in keys} == set(BY_KEY)
    for keys in drawn:
        assert len({study._DRAWN[key] for key in keys}) == len(keys)
        assert len({study._DRAWN[key][1] for key in keys}) == len(keys)


def test_a_cure_differs_from_the_library_in_its_modes_alone():
    library, cured = (study.cell_of(BY_KEY[key], 1, STEPS) for key in ("bn", "bn-frozen"))
    assert replace(cured, name="", how="library") == replace(library, name="")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditions": "none,bm"}, "bm"),
        ({"seeds": 0}, "seeds"),
        ({"steps": 2047}, "at least 2048"),
    ],
)
def test_bad_options_are_refused_before_any_run(options, words, tmp_path):
    with pytest.raises(BatchproofError, match=words):
        study.run(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_study_needs_no_jax():
    code = (
        "import sys; sys.modules['jax'] = None; "
        "import batchproof.study.claims.naturecnn_breakout; "
        "assert not {'torch', 'stable_baselines3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_in_the_registry():
    assert STUDIES[study.NAME].module == study.__name__


# --- cells -----------------------------------------------------------------------------------


def tiny(name: str, norm: str = "none", how: str = "library", seed: int = 0) -> Cell:
    return Cell(name, norm, how, seed, steps=64, horizon=64, **TINY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cell that the clinic looked at, by a process of its own."""
    pytest.importorskip("ale_py")
    out = tmp_path_factory.mktemp("cells")
    cell = replace(tiny("a", "batch", "frozen"), audit=True)
    return out, cell, pixels.run_cells([cell], out, progress=False, workers=1)["a"]


def test_a_cell_has_a_row_for_each_update_and_its_games(trained):
    _, cell, found = trained
    assert found.metrics["step"].tolist() == [32.0, 64.0]
    assert len(found.record["scores"]) == cell.games
    assert found.record["score"] == pytest.approx(np.mean(found.record["scores"]))
    assert found.metrics["first_ratio_error"].max() < 1e-5
    assert (found.metrics["update_cpu_s"] > 0).all()


def test_the_clinic_looked_at_every_channel(trained):
    out, _, found = trained
    clinic = found.record["clinic"]
    assert list(clinic["channels"].values()) == [32, 64, 64]
    assert clinic["outcomes"]["BP205"] in ("fail", "review")  # the library's own way is deployed
    assert json.loads((out / "cells/a/channels.json").read_text())[0]["running_mean"]
    assert (out / "cells/a/audit.json").is_file()


def test_finished_cells_are_read_back_and_others_refused(trained, monkeypatch):
    out, cell, found = trained

    def never(*_args: object) -> None:
        raise AssertionError("a finished cell was started again")

    monkeypatch.setattr(pixels, "_start", never)
    again = pixels.run_cells([cell], out, progress=False)["a"]
    assert again.record == found.record
    np.testing.assert_array_equal(again.metrics["step"], found.metrics["step"])
    with pytest.raises(BatchproofError, match="other settings"):
        pixels.run_cells([replace(cell, steps=128)], out, progress=False)
    # A cell from before a setting was there has its default.
    path = out / "cells/a/run.json"
    record = records.read_json(path)
    older = {key: value for key, value in record["cell"].items() if key != "autocast"}
    records.write_json(path, record | {"cell": older})
    held = pixels.run_cells([cell], out, progress=False)["a"]
    assert held.record["score"] == found.record["score"]
    with pytest.raises(BatchproofError, match="other settings"):
        pixels.run_cells([replace(cell, autocast="bfloat16")], out, progress=False)
    records.write_json(path, record)


def test_no_cell_begins_after_the_budget(trained, monkeypatch):
    out, cell, _ = trained

    def never(*_args: object) -> None:
        raise AssertionError("a cell was started after the budget")

    monkeypatch.setattr(pixels, "_start", never)
    found = pixels.run_cells([tiny("b"), cell], out, progress=False, budget_s=0.0)
    assert list(found) == [cell.name]


def test_a_budget_leaves_a_study_of_what_is_finished(tmp_path, monkeypatch):
    made = outcome({"none": 9.0, "bn": 6.0, "layer": 7.0}, seeds=3)
    for name in ("bn-seed1", "layer-seed0", "layer-seed1"):
        del made.results[name]
    monkeypatch.setattr(study, "run_cells", lambda *_args, **_options: made.results)
    found = study.run(tmp_path, seeds=3, conditions="none,bn,layer", budget=1.0, progress=False)
    assert {row["name"]: len(row["returns"]) for row in found["conditions"]} == {"none": 3, "bn": 1}
    assert found["trainings"] == {"asked": 9, "finished": 4}
    assert "4 of 9 trainings are finished" in (tmp_path / "report.html").read_text()


def test_a_budget_in_which_nothing_was_finished_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_cells", lambda *_args, **_options: {})
    with pytest.raises(BatchproofError, match="--budget"):
        study.run(tmp_path, budget=1.0, progress=False)


def test_a_damaged_cell_is_told_in_one_line(tmp_path):
    folder = tmp_path / "cells/c"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with pytest.raises(BatchproofError, match="not a run record"):
        pixels.run_cells([tiny("c")], tmp_path, progress=False)
    records.write_json(folder / "run.json", {"cell": asdict(tiny("c"))})
    (folder / "metrics.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(BatchproofError, match="not a readable Parquet file"):
        pixels.run_cells([tiny("c")], tmp_path, progress=False)


def test_a_failed_training_is_told_in_one_line(tmp_path, monkeypatch):
    # The cell's own process stops at a file that is not its cell.
    monkeypatch.setattr(pixels, "asdict", lambda _: {"norm": "bats"})
    with pytest.raises(BatchproofError, match=r"c failed .*missing.* run again") as told:
        pixels.run_cells([tiny("c")], tmp_path, progress=False)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "cells/c/run.json").exists()


def test_a_training_whose_study_ended_while_it_started_ends_too(tmp_path):
    pytest.importorskip("ale_py")
    records.write_json(tmp_path / "cell.json", asdict(tiny("c")))
    words = [sys.executable, "-m", "batchproof.study.pixels", str(tmp_path), "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "the study that started this training has ended"
    assert not (tmp_path / "run.json").exists()


def test_schedules_fall_to_zero_at_their_horizon():
    pytest.importorskip("ale_py")
    cell = replace(tiny("d"), steps=200, horizon=1000)
    model = pixels.make_model(cell)
    assert model.lr_schedule(1.0) == pytest.approx(2.5e-4)
    assert model.lr_schedule(0.0) == pytest.approx(2.5e-4 * 0.8)
    assert model.clip_range(0.5) == pytest.approx(0.1 * 0.9)
    short = pixels.make_model(replace(cell, horizon=200))
    assert short.lr_schedule(-0.01) == 0.0
    for made in (model, short):
        made.get_env().close()


def test_the_report_is_written_from_cells_that_are_there(tmp_path, monkeypatch):
    made = outcome({"none": 9.0, "bn": 6.0, "bn-preserved": 10.0}, seeds=2)
    monkeypatch.setattr(study, "run_cells", lambda *_args, **_options: made.results)
    study.run(tmp_path, seeds=2, progress=False, command="batchproof study x")
    stored = records.read_json(tmp_path / "study.json")
    assert stored["cures"][0]["name"] == "bn-preserved"
    assert stored["frames"] == 800_000
    assert {row["name"] for row in stored["conditions"]} == {"none", "bn", "bn-preserved"}
    page = (tmp_path / "report.html").read_text()
    assert "800,000 frames" in page
    for name in ("curves.png", "first-kl.png", "first-clip-fraction.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "metrics.parquet").is_file()


def test_a_cell_survives_its_json(tmp_path: Path):
    cell = study.cell_of(BY_KEY["bn"], 0, STEPS)
    records.write_json(tmp_path / "cell.json", asdict(cell))
    assert Cell(**records.read_json(tmp_path / "cell.json")) == cell
