"""The pictures: the numbers in them, their size, and that no words run into each other."""

import itertools
import struct
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib

from batchproof.study.plots import (
    BLUE,
    GREY,
    VERMILLION,
    AgentAnswer,
    Curve,
    ForestRow,
    Panel,
    answer_picture,
    condition_table_plot,
    learning_curves,
)

STEPS = np.arange(0, 3001, 100)


def rising(end, seed=0, n=5):
    """Returns of n seeds that rise from about 0 to about `end`, shape (n, T)."""
    noise = np.random.default_rng(seed).normal(0.0, 0.5, (n, STEPS.size))
    return end * (1 - np.exp(-((STEPS / 500.0) ** 2))) + noise


def three_curves(best=30.0):
    return [
        Curve("no batch norm", STEPS, rising(best, 1), GREY),
        Curve("BN, critic in T in the actor's loss", STEPS, rising(-1.5, 2), VERMILLION),
        Curve("BN, critic in E in the actor's loss", STEPS, rising(best, 3), BLUE, "--"),
    ]


def kappa_curves():
    generator = np.random.default_rng(0)
    return [
        Curve("no batch norm", STEPS, generator.uniform(0.9, 1.0, (5, STEPS.size)), GREY),
        Curve("BN, critic in T", STEPS, generator.uniform(0, 6e-8, (5, STEPS.size)), VERMILLION),
        Curve("BN, critic in E", STEPS, generator.uniform(0.5, 1.0, (5, STEPS.size)), BLUE, "--"),
    ]


def forest_rows():
    return [
        ForestRow("No batch norm", {"TD3": [30.0] * 5, "SAC": [27.0, 26.5, 27.2]}, {"TD3": 30.0}),
        ForestRow(
            "BN in the critic, running statistics in the actor's loss",
            {"TD3": [-1.0, 2.0, -4.0, None, 1.0], "SAC": [7.0, 9.0, 12.0]},
            {"TD3": 20.0, "SAC": 7.6},
            detail="TTETT",
            missed=frozenset({"TD3"}),
        ),
        ForestRow(
            "BN in the actor only", {"TD3": [None, float("nan")]}, {"TD3": 29.8, "SAC": None}
        ),
    ]


def data_lines(axes):
    """The lines of an axes without the short ones that lead to a name."""
    return [line for line in axes.lines if line.get_label() != "_leader"]


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def words(figure):
    """(text, box in pixels) of every word drawn."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += axes.texts
        if axes.axison:
            texts += [axes.xaxis.label, axes.yaxis.label]
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                low, high = sorted(limits)
                texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]


def assert_legible(figure):
    boxes = words(figure)
    assert len(boxes) > 5
    page = figure.bbox
    for text, box in boxes:
        assert box.x0 >= 0, f"{text!r} leaves the page"
        assert box.y0 >= 0, f"{text!r} leaves the page"
        assert box.x1 <= page.width + 0.5, f"{text!r} leaves the page"
        assert box.y1 <= page.height + 0.5, f"{text!r} leaves the page"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        # A tick's box has air around its glyphs, so boxes may touch by a hair.
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert not (wide > 2.0 and high > 3.0), f"{one!r} overlaps {other!r}"


def test_learning_curves_draws_mean_band_and_reference(tmp_path):
    curves = three_curves()
    panels = [Panel("TD3", curves), Panel("SAC", curves[:2])]
    figure = learning_curves(panels, tmp_path / "curves.png", best=30.0)
    td3, sac = figure.axes
    assert len(data_lines(td3)) == 3 + 1
    assert len(data_lines(sac)) == 2 + 1
    assert td3.get_ylim() == sac.get_ylim()
    reference, *means = data_lines(td3)
    assert set(reference.get_ydata()) == {30.0}
    for line, curve in zip(means, curves, strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve.values.mean(axis=0))
        assert line.get_color() == curve.color
    band = td3.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == STEPS[-1], 1]
    assert at_end.min() == pytest.approx(curves[0].values[:, -1].min())
    assert at_end.max() == pytest.approx(curves[0].values[:, -1].max())


def test_each_seed_and_no_reference(tmp_path):
    panels = [Panel("TD3", three_curves())]
    figure = learning_curves(panels, tmp_path / "c.png", best=None, each_seed=True)
    assert len(data_lines(figure.axes[0])) == 3 * (1 + 5)
    assert len(figure.axes[0].collections) == 3
    figure = learning_curves(panels, tmp_path / "c.png", best=None, each_seed=True, band=False)
    assert not figure.axes[0].collections
    assert "band" not in " ".join(text.get_text() for text in figure.texts)


def test_panels_of_other_units_have_limits_of_their_own(tmp_path):
    small = Panel("values", [Curve("BN", STEPS, rising(1.0))])
    large = Panel("scale", [Curve("BN", STEPS, 40 * rising(1.0))])
    alone = learning_curves([small], tmp_path / "c.png", best=None)
    figure = learning_curves([small, large], tmp_path / "c.png", best=None, same_scale=False)
    assert figure.axes[0].get_ylim() == alone.axes[0].get_ylim()
    assert figure.axes[1].get_ylim()[1] > 10 * figure.axes[0].get_ylim()[1]


def test_a_diverged_seed_leaves_the_mean_and_is_counted(tmp_path):
    values = rising(10.0)
    values[2, 12:] = np.nan
    values[4, 20:] = np.inf
    figure = learning_curves([Panel("SAC", [Curve("BN", STEPS, values)])], tmp_path / "c.png")
    mean = data_lines(figure.axes[0])[1].get_ydata()
    assert mean[-1] == pytest.approx(values[[0, 1, 3], -1].mean())
    assert any("2 of 5 diverged" in text for text, _ in words(figure))
    assert_legible(figure)


def test_a_condition_whose_every_seed_diverged_still_has_its_name(tmp_path):
    values = rising(10.0)
    values[:, 5:] = np.nan
    lost = [Curve("BN", STEPS, values), Curve("lost", STEPS, np.full_like(values, np.nan))]
    figure = learning_curves([Panel("SAC", lost)], tmp_path / "c.png")
    assert sum("5 of 5 diverged" in text for text, _ in words(figure)) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_learning_curves_are_legible(tmp_path, count):
    panels = [Panel(f"Agent {i}", three_curves(30.0 - i)) for i in range(count)]
    path = tmp_path / "curves.png"
    figure = learning_curves(panels, path, headline="Five seeds each", columns=3)
    assert_legible(figure)
    assert png_size(path)[0] == 2400


def test_many_curves_that_end_at_one_place_keep_their_names_apart(tmp_path):
    curves = [Curve(f"condition {i}", STEPS, rising(30.0, i)) for i in range(7)]
    figure = learning_curves([Panel("TD3", curves)], tmp_path / "c.png")
    assert_legible(figure)


def test_answer_picture(tmp_path):
    path = tmp_path / "deep" / "answer.png"
    agents = [AgentAnswer(name, three_curves(), kappa_curves()) for name in ("TD3", "SAC")]
    figure = answer_picture(
        agents,
        path,
        headline="One forward pass decides: with batch statistics the actor is told nothing, "
        "and with running statistics it learns",
        subtitle="Constant observation, reward = action, five seeds.",
        dpi=100,
    )
    assert len(figure.axes) == 4
    returns, kappa = figure.axes[:2]
    assert len(data_lines(returns)) == 4
    assert len(data_lines(kappa)) == 3
    assert kappa.get_yscale() == "log"
    assert sum("zero to rounding" in text for text, _ in words(figure)) == 2
    assert png_size(path) == pytest.approx(figure.get_size_inches() * 100, abs=1)
    assert png_size(path)[0] == 1200
    assert_legible(figure)


def test_kappa_of_zero_is_drawn_at_the_floor_and_undefined_kappa_is_a_gap(tmp_path):
    zero = np.zeros((2, STEPS.size))
    zero[:, :3] = np.nan
    agents = [AgentAnswer("TD3", three_curves(), [Curve("T", STEPS, zero)])]
    figure = answer_picture(agents, tmp_path / "a.png", headline="x", kappa_floor=1e-9)
    (line,) = data_lines(figure.axes[1])
    drawn = line.get_ydata()
    assert np.isnan(drawn[:3]).all()
    assert (drawn[3:] == 1e-9).all()
    assert not any("diverged" in text for text, _ in words(figure))


def test_key_names_predictions_only_where_there_are_some(tmp_path):
    def words(rows):
        figure = condition_table_plot(rows, tmp_path / "f.png")
        key = next(axes for axes in figure.axes if axes.get_gid() == "key")
        return {text.get_text() for text in key.texts}

    every = words(forest_rows())
    assert {"predicted before", "predicted, missed"} <= every
    assert words(forest_rows()[:1]) == every - {"predicted, missed"}
    none = [ForestRow("No batch norm", {"TD3": [30.0, 29.0]})]
    assert words(none) == every - {"predicted before", "predicted, missed"}


def test_condition_table_plot(tmp_path):
    path = tmp_path / "forest.png"
    figure = condition_table_plot(forest_rows(), path, headline="Who learns", dpi=100)
    td3, sac, _ = figure.axes
    # The best line; then range, seeds, mean and prediction of each row that has them.
    assert len(td3.lines) == 1 + 4 + 4 + 1
    assert len(sac.lines) == 1 + 3 + 4
    _, low_to_high, seeds, mean, prediction = [*td3.lines[:1], *td3.lines[5:9]]
    assert list(low_to_high.get_xdata()) == [-4.0, 2.0]
    assert sorted(seeds.get_xdata()) == [-4.0, -1.0, 1.0, 2.0]
    assert mean.get_xdata()[0] == -0.5
    assert prediction.get_xdata()[0] == 20.0
    said = [text for text, _ in words(figure)]
    assert "missed\n1 diverged" in said
    assert "2 diverged" in said
    assert "not run" in said
    assert "\N{MINUS SIGN}0.5" in said
    assert png_size(path)[0] == 1200
    assert_legible(figure)


def test_long_words_wrap_and_do_not_collide(tmp_path):
    long = "final return per episode of the deterministic policy, undiscounted, over ten episodes"
    assert_legible(condition_table_plot(forest_rows(), tmp_path / "f.png", x_label=long))
    panels = [Panel(long, three_curves()), Panel("b", three_curves()), Panel("c", three_curves())]
    figure = learning_curves(panels, tmp_path / "c.png", y_label=long, headline=long * 2, columns=3)
    assert_legible(figure)


def test_equal_seeds_stay_countable(tmp_path):
    figure = condition_table_plot(forest_rows()[:1], tmp_path / "f.png")
    heights = figure.axes[0].lines[2].get_ydata()
    assert len(set(heights)) == 5


def test_svg_is_written_by_suffix(tmp_path):
    path = tmp_path / "forest.svg"
    condition_table_plot(forest_rows(), path)
    assert "<svg" in path.read_text(encoding="utf-8")[:1000]


def test_dollar_signs_are_text_and_not_mathematics(tmp_path):
    curve = Curve("costs $5 and $ \\frac", STEPS, rising(3.0))
    figure = learning_curves([Panel("a $ b", [curve])], tmp_path / "c.png", headline="$x^2$")
    assert_legible(figure)


def test_drawing_touches_no_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    learning_curves([Panel("TD3", three_curves())], tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_loaded_only_to_draw_and_pyplot_never(tmp_path):
    code = f"""
import sys
from batchproof.study import plots
assert "matplotlib" not in sys.modules
curve = plots.Curve("a", [0, 1], [[1.0, 2.0]])
plots.learning_curves([plots.Panel("p", [curve])], {str(tmp_path / "c.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'a'"):
        Curve("a", STEPS, rising(1.0)[:, :-1])
    with pytest.raises(ValueError, match="no values"):
        Curve("a", np.array([]), np.empty((3, 0)))
    with pytest.raises(ValueError, match="steps must be finite"):
        Curve("a", np.array([0.0, np.nan]), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="at least one panel"):
        learning_curves([], tmp_path / "c.png")
    with pytest.raises(ValueError, match="columns"):
        learning_curves([Panel("a", three_curves())], tmp_path / "c.png", columns=0)
    with pytest.raises(ValueError, match="at least one agent"):
        answer_picture([], tmp_path / "c.png", headline="x")
    with pytest.raises(ValueError, match="kappa_floor"):
        answer_picture(
            [AgentAnswer("TD3", three_curves(), kappa_curves())],
            tmp_path / "c.png",
            headline="x",
            rounding=1e-12,
        )
    with pytest.raises(ValueError, match="at least one row"):
        condition_table_plot([], tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []
