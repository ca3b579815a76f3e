"""Folders in the format that training and studies write, and what the report makes of them."""

import json
import shutil

import pytest

from batchproof.errors import BatchproofError
from batchproof.records import write_columns, write_json
from batchproof.report import data

NORM = {"kind": "batch", "placement": "pre", "momentum": 0.1, "eps": 1e-5}


def names(cells):
    return [cell.condition for cell in cells]


def test_a_run_becomes_one_cell_with_a_curve_per_seed(tmp_path, training, write_run):
    run = write_run(tmp_path / "a", training(seeds=(3, 5)), kappa=[[0.1, 0.2, 0.3]] * 2)
    [cell] = data.read([run])
    assert (cell.condition, cell.task, cell.seeds) == ("td3", "Pendulum-v1", (3, 5))
    assert cell.steps.tolist() == [10, 20, 30]
    assert cell.metrics["return"].tolist() == [[310, 320, 330], [510, 520, 530]]
    assert cell.metrics["kappa"][1].tolist() == [0.1, 0.2, 0.3]
    assert set(cell.metrics) == {"return", "kappa"}
    assert cell.facts["wall_s"] == 60.0


def test_conditions_are_named_by_what_differs(tmp_path, training, write_run):
    runs = [
        write_run(tmp_path / "a", training()),
        write_run(tmp_path / "b", training(norm=NORM)),
        write_run(tmp_path / "c", training(norm=NORM, plan="TEEJJ")),
        write_run(tmp_path / "d", training("sac", norm=NORM | {"placement": "post"})),
    ]
    assert names(data.read(runs)) == [
        "td3 · no norm",
        "td3 · batch pre · TETTE",
        "td3 · batch pre · TEEJJ",
        "sac · batch post · TETTE",
    ]


def test_what_is_the_same_or_has_no_effect_is_not_named(tmp_path, training, write_run):
    bare = {"kind": "none", "placement": "post", "momentum": 0.5}
    runs = [
        write_run(tmp_path / "a", training("td3", plan="TETTE")),
        write_run(tmp_path / "b", training("sac", plan="TTTTE", norm=bare, config={"tau": 1.0})),
    ]
    assert names(data.read(runs)) == ["td3", "sac"]  # no norm, so plan and momentum do nothing


def test_other_settings_are_named_where_they_depart_from_most(tmp_path, training, write_run):
    wide = {"hidden": [256, 256], "norm": {"kind": "none", "placement": "pre"}}
    runs = [
        write_run(tmp_path / "a", training()),
        write_run(tmp_path / "b", training(config={"gamma": 0.9})),
        write_run(tmp_path / "c", training(config={"actor": wide, "critic": wide})),
        write_run(tmp_path / "d", training(config={"critic": wide}, update_every=4)),
        write_run(tmp_path / "e", training(update_every=1)),
    ]
    found = names(data.read(runs))
    assert found[0] == "td3"
    assert found[1] == "td3 · gamma 0.9"
    assert found[2] == "td3 · hidden 256×256"
    assert found[3] == "td3 · critic hidden 256×256 · update every 4"


def test_lengths_are_named_only_where_they_differ_on_one_task(tmp_path, training, write_run):
    runs = [
        write_run(tmp_path / "a", training(steps=30)),
        write_run(tmp_path / "b", training(env="Hop-v5", steps=999)),
    ]
    assert names(data.read(runs)) == ["td3", "td3"]
    more = write_run(tmp_path / "c", training(env="Hop-v5", steps=50))
    assert names(data.read([*runs, more])) == ["td3", "td3 · steps 999", "td3 · steps 50"]


def test_norms_that_differ_between_networks_are_both_named(tmp_path, training, write_run):
    net = {"hidden": [64, 64], "norm": NORM}
    runs = [
        write_run(tmp_path / "a", training(config={"critic": net})),
        write_run(tmp_path / "b", training()),
    ]
    assert names(data.read(runs))[0] == "td3 · actor no norm, critic batch pre"


def test_plans_of_networks_without_modes_are_not_drawn(tmp_path, training, write_run):
    layer = write_run(tmp_path / "a", training(norm={"kind": "layer", "placement": "pre"}))
    batch = write_run(tmp_path / "b", training(norm=NORM))
    assert [cell.plan for cell in data.read([layer, batch])] == [None, "TETTE"]


def test_each_set_of_environment_options_is_a_task(tmp_path, training, write_run):
    record = training(env="E-v0", seeds=(0, 1, 1000, 1001))
    record["env_options"] = [{"ending": "a", "size": 3}] * 2 + [{"ending": "b", "size": 3}] * 2
    first, second = data.read([write_run(tmp_path / "a", record)])
    assert (first.task, second.task) == ("E-v0, ending a", "E-v0, ending b")
    assert (first.seeds, second.seeds) == ((0, 1), (1000, 1001))
    assert second.metrics["return"][0, 0] == 100010.0


def test_runs_of_one_condition_with_other_seeds_are_joined(tmp_path, training, write_run):
    runs = [
        write_run(tmp_path / "a", training(seeds=(0, 1))),
        write_run(tmp_path / "b", training(seeds=(7,)), steps=(20, 30, 40)),
    ]
    [cell] = data.read(runs)
    assert cell.seeds == (0, 1, 7)
    assert cell.steps.tolist() == [20, 30]
    assert cell.metrics["return"].tolist() == [[20, 30], [120, 130], [720, 730]]
    assert cell.facts["wall_s"] == 120.0
    # 60 s for 30 steps and 60 s for 40, whatever part of them the joined curve shows.
    assert cell.facts["seconds_per_step"] == pytest.approx(60 / 30 + 60 / 40)


def test_runs_of_one_condition_with_the_same_seeds_are_told_apart_by_folder(
    tmp_path, training, write_run
):
    runs = [write_run(tmp_path / name, training()) for name in ("before", "after")]
    assert names(data.read(runs)) == [f"td3 ({tmp_path / n})" for n in ("before", "after")]


def test_seeds_that_have_only_begun_do_not_cut_finished_ones_short(tmp_path, training, write_run):
    runs = [
        write_run(tmp_path / "a", training(seeds=(0, 1))),
        write_run(tmp_path / "b", training(seeds=(2, 3)), status="stopped", steps=(10,)),
    ]
    notes: list[str] = []
    [cell] = data.read(runs, notes)
    assert cell.seeds == (0, 1)
    assert cell.steps.tolist() == [10, 20, 30]
    assert notes == ["Left out: seeds 2, 3 of td3 on Pendulum-v1, at 10 of 30 steps."]
    [cell] = data.read(runs[1:])  # where nothing has finished they are all there is
    assert cell.seeds == (2, 3)


def test_runs_without_an_evaluation_are_left_out_of_a_folder(tmp_path, training, write_run):
    write_run(tmp_path / "all" / "a", training())
    begun = write_run(tmp_path / "all" / "b", training("sac"))
    (begun / "metrics.parquet").unlink()
    notes: list[str] = []
    assert names(data.read([tmp_path / "all"], notes)) == ["td3"]
    assert notes == [f"Left out: {begun} has no evaluation yet."]
    shutil.rmtree(tmp_path / "all" / "a")
    with pytest.raises(BatchproofError, match="no evaluation yet"):
        data.read([tmp_path / "all"])


def test_folders_that_overlap_are_joined_within_each(tmp_path, training, write_run):
    write_run(tmp_path / "a" / "first", training(seeds=(0, 1)))
    write_run(tmp_path / "b" / "first", training(seeds=(0, 1)))
    write_run(tmp_path / "b" / "more", training(seeds=(2,)))
    first, second = data.read([tmp_path / "a", tmp_path / "b"])
    assert (first.condition, first.seeds) == (f"td3 ({tmp_path / 'a'})", (0, 1))
    assert (second.condition, second.seeds) == (f"td3 ({tmp_path / 'b'})", (0, 1, 2))
    write_run(tmp_path / "b" / "again", training(seeds=(2,)))
    assert len(data.read([tmp_path / "a", tmp_path / "b"])) == 4


def test_a_folder_of_runs_is_searched_and_nothing_is_read_twice(tmp_path, training, write_run):
    a = write_run(tmp_path / "all" / "x" / "a", training())
    write_run(tmp_path / "all" / "b", training("sac"))
    assert sorted(names(data.read([tmp_path / "all", a, tmp_path / "all"]))) == ["sac", "td3"]


def test_a_folder_name_with_an_equals_sign_adds_no_column(tmp_path, training, write_run):
    # Parquet readers take such names for the key of a data set.
    [cell] = data.read([write_run(tmp_path / "seed=9", training())])
    assert cell.seeds == (0, 1)


def test_a_seed_that_diverged_stays_and_early_blanks_do_not(tmp_path, training, write_run):
    nan = float("nan")
    gone = write_run(tmp_path / "a", training(), returns=[[1, 2, nan], [1, 2, 3]])
    [cell] = data.read([gone])
    assert cell.steps.tolist() == [10, 20, 30]
    blank = write_run(tmp_path / "b", training("sac"), returns=[[nan, 2, 3], [1, 2, 3]])
    [cell] = data.read([blank])
    assert cell.steps.tolist() == [20, 30]


STUDY = {
    "study": "s",
    "conditions": [
        {"name": "td3-slot3-E-x", "label": "slot 3 in E", "modes": "TEETE", "wall_s": 9.0},
        {"name": "sac-slot3-E-x", "label": "slot 3 in E", "modes": None},
    ],
    "command": "batchproof study s",
}


def write_study(folder, study=STUDY, **columns):
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(study))
    write_columns(folder / "metrics.parquet", columns)
    return folder


def test_a_study_has_a_cell_for_each_combination_of_its_words(tmp_path):
    folder = write_study(
        tmp_path / "s",
        condition=["slot3-E"] * 4,
        algo=["td3", "td3", "sac", "sac"],
        ending=["x"] * 4,
        seed=[0, 1, 0, 1],
        step=[5] * 4,
        score=[1.0, 2.0, 3.0, 4.0],
    )
    td3, sac = data.read([folder])
    assert (td3.condition, td3.plan, td3.task) == ("td3 · slot 3 in E · x", "TEETE", "study s")
    assert (sac.condition, sac.plan) == ("sac · slot 3 in E · x", None)
    assert sac.metrics["return"].tolist() == [[3.0], [4.0]]  # a pixel study's score
    assert td3.facts["wall_s"] == 9.0


def test_labels_that_tell_nothing_apart_give_way_to_the_words(tmp_path):
    rows = [{"name": "a", "label": "same"}, {"name": "b", "label": "same"}]
    folder = write_study(
        tmp_path / "s",
        STUDY | {"conditions": rows},
        condition=["a", "b"],
        seed=[0, 0],
        step=[5, 5],
        **{"return": [1.0, 2.0]},
    )
    assert names(data.read([folder])) == ["a", "b"]


def test_bad_folders_are_named_in_one_line(tmp_path, training, write_run):
    def says(*folders):
        with pytest.raises(BatchproofError) as caught:
            data.read(list(folders))
        message = str(caught.value)
        assert "\n" not in message
        return message

    assert "give at least one" in says()
    assert "no such folder" in says(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "neither a run (run.json) nor a study" in says(tmp_path / "empty")
    run = write_run(tmp_path / "a", training())
    (run / "metrics.parquet").write_bytes(b"PAR1 cut short")
    assert "not a readable Parquet file" in says(run)
    (run / "metrics.parquet").unlink()
    assert "no evaluation yet" in says(run)
    (run / "run.json").write_text('{"training": 3}')
    assert "not a run record" in says(run)
    (run / "run.json").write_text("{")
    assert "not a readable JSON file" in says(run)
    study = write_study(tmp_path / "s", seed=[0], batch=[1], loss=[1.0])
    assert "no column step, return" in says(study)
    record = training(seeds=(0, 1, 2))
    record["env_options"] = [{}, {}]
    assert "env_options has 2 entries for 3" in says(write_run(tmp_path / "b", record))


def compared(folder, training, write_run, baseline, *conditions):
    """A folder as `batchproof compare` leaves it, of conditions that differ in gamma."""
    cells = []
    for name, gamma in conditions:
        write_run(folder / "cells" / name, training(config={"gamma": gamma}))
        populations = [{"folder": f"cells/{name}"}]
        cells.append({"condition": name, "populations": populations})
    write_json(folder / "compare.json", {"baseline": baseline, "cells": cells})
    return folder


@pytest.mark.parametrize(("baseline", "gammas"), [(None, [0.3, 0.2, 0.1]), ("c", [0.1, 0.3, 0.2])])
def test_a_comparison_keeps_its_order_and_its_baseline_comes_first(
    tmp_path, training, write_run, baseline, gammas
):
    conditions = [("b", 0.3), ("a", 0.2), ("c", 0.1)]
    folder = compared(tmp_path / "all", training, write_run, baseline, *conditions)
    cells = data.read([folder])
    assert [cell.settings["gamma"] for cell in cells] == gammas
    # And its names, which those of settings stand in for where there are other runs as well.
    own = {gamma: name for name, gamma in conditions}
    assert names(cells) == [own[gamma] for gamma in gammas]
    more = write_run(tmp_path / "more", training(config={"gamma": 0.4}))
    assert names(data.read([folder, more]))[0] == f"td3 · gamma {gammas[0]}"


def test_a_comparison_whose_record_is_another_s_is_told(tmp_path, training, write_run):
    folder = compared(tmp_path / "all", training, write_run, None, ("a", 0.2))
    write_json(folder / "compare.json", {"cells": 3})
    with pytest.raises(BatchproofError, match="not the record of a comparison"):
        data.read([folder])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"training": None}, "not a run record"),
        ({"seeds": [[0], [1]]}, "seeds is not a list of whole numbers"),
        ({"seeds": "01"}, "seeds is not a list of whole numbers"),
        ({"env_options": "x"}, "env_options is not an object"),
        ({"env_options": [None, None]}, "env_options is not an object"),
        ({"config": {"actor": {"norm": {"kind": ["batch"]}}}}, "kind is not text"),
        ({"wall_s": "long"}, 'wall_s cannot be "long"'),
        ({"status": ["finished"]}, 'status cannot be \\["finished"\\]'),
    ],
)
def test_what_is_wrong_with_a_record_is_told(tmp_path, training, write_run, change, part):
    folder = write_run(tmp_path / "a", training())
    run = json.loads((folder / "run.json").read_text())
    of_run = change.keys() <= {"training", "wall_s", "status"}
    run = run | change if of_run else run | {"training": run["training"] | change}
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(BatchproofError, match=part) as caught:
        data.read([folder])
    assert str(folder / "run.json") in str(caught.value)


def test_a_study_s_time_must_be_one(tmp_path):
    rows = [{"name": "a", "wall_s": "long"}]
    folder = write_study(
        tmp_path / "s",
        STUDY | {"conditions": rows},
        condition=["a"],
        seed=[0],
        step=[5],
        **{"return": [1.0]},
    )
    with pytest.raises(BatchproofError, match='wall_s cannot be "long"'):
        data.read([folder])
