"""Tables and pictures of finished runs: their figures, and what makes a picture readable."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from moe_reduce.reports import (
    adaptation_picture,
    ladder_picture,
    plan_table,
    reduction_picture,
    reduction_table,
    style,
    tables,
    text_to_lora_pictures,
    training_pictures,
)
from moe_reduce.reports.summaries import entropy, spread

RESULTS = Path(__file__).parent.parent / "docs/results"


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved, which are not written."""
    figures: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, _: figures.append(figure))
    return figures


def test_one_table_maker_aligns_and_writes_markdown():
    rows = [["", "loss", "tokens"], ["dense", "3.1", "1,000"], ["pool of all", "3.25", "9"]]
    assert tables.aligned(rows).splitlines() == [
        "             loss  tokens",
        "dense         3.1   1,000",
        "pool of all  3.25       9",
    ]
    assert tables.markdown(rows).splitlines()[:2] == ["|  | loss | tokens |", "| --- | --- | --- |"]
    assert tables.transposed([["a", "b"], ["c", "d"]]) == [["a", "c"], ["b", "d"]]


def test_figures():
    assert spread([1.0, 2.0], ".2f") == "1.50 ± 0.50"
    assert spread([0.25, 0.25], "+.2f") == "+0.25 ± 0.00"
    assert spread([0.5], ".1%") == "50.0%"
    assert spread([]) == ""
    assert entropy([0.25] * 4) == 1.0
    assert entropy([1.0, 0.0]) == 0.0
    assert [plan_table.size(count) for count in (999, 1_500, 61_064_245_248, 2e12)] == [
        "999 B",
        "1.5 kB",
        "61.1 GB",
        "2 TB",
    ]


def test_colours_stand_for_families_and_line_styles_tell_their_members_apart():
    looks = style.looks(["dense", "dense_fast", "shared_moe", "something", "else"])
    assert looks["dense"]["color"] == looks["dense_fast"]["color"]
    assert looks["dense"]["linestyle"] != looks["dense_fast"]["linestyle"]
    assert len({look["color"] for look in looks.values()}) == 4
    assert style.family("layers_frequency") == "layers_frequency"
    assert style.family("layers_other") == "layers"
    assert style.family("denser") == "denser"


@pytest.mark.parametrize("count", [1, 8, 9, 11, 30])
def test_no_chart_gets_more_than_eight_lines(count):
    names = [f"model {number}" for number in range(count)]
    groups = style.charts(names)
    assert [name for group in groups for name in group] == names
    assert max(map(len, groups)) <= style.MOST_LINES
    compared = style.charts(names, repeat_first=True)
    assert all(group[0] == names[0] for group in compared)
    assert [names[0], *(name for group in compared for name in group[1:])] == names
    assert max(map(len, compared)) <= style.MOST_LINES


def test_labels_at_line_ends_do_not_overlap():
    figure, [[axes]] = style.panels(size=(6, 4))
    for number in range(8):
        style.line(axes, [0, 1], [0, 1 + 0.001 * number], f"line {number}")
    style.label_ends(axes)
    figure.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without the strokes to the lines
    names = sorted(boxes, key=lambda name: boxes[name].y0)
    assert names == [f"line {number}" for number in range(8)]
    for lower, upper in itertools.pairwise(names):
        assert boxes[upper].y0 >= boxes[lower].y1
    assert all(box.x0 >= axes.get_window_extent().x1 for box in boxes.values())


def test_a_single_point_has_a_marker(tmp_path, drawn):
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
        steps = (5,) if name == "short" else (5, 10)
        lines = [{"step": step, "split": split, "loss": 3.0} for split in ("train", "validation") for step in steps]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training_pictures.loss_picture({name: tmp_path / name for name in ("short", "long")}, tmp_path / "loss.png")
    (figure,) = drawn
    for line in figure.axes[0].get_lines():
        assert len(line.get_xdata()) > 1 or line.get_marker() not in ("None", "", None)


@pytest.mark.parametrize(
    ("name", "method", "recovery"),
    [
        ("layers_reap_no_recovery", "layers", "no recovery"),
        ("pool_taught", "pool", "routers"),
        ("layers_frequency", "layers_frequency", "routers"),
        ("pool_experts_taught_long_free", "pool", "experts, longer"),
        ("pool_skema", "pool", "SkeMA"),
    ],
)
def test_names_of_reductions_tell_method_and_recovery(name, method, recovery):
    assert (ladder_picture.method(name), ladder_picture.recovery(name)) == (method, recovery)


def test_pictures_of_the_kept_results_hold_at_most_eight_labelled_lines(drawn):
    runs = json.loads((RESULTS / "reduce_small/summary.json").read_text())["runs"]
    ladder_picture.picture({n: [ladder_picture.ladder(run) for run in found] for n, found in runs.items()}, Path("x"))
    lines = (RESULTS / "cpu_ablations/curves.jsonl").read_text().splitlines()
    training_pictures.curves_picture([json.loads(line) for line in lines], "title", Path("x"))
    assert [len(figure.axes) for figure in drawn] == [3, 4]
    for axes in (axes for figure in drawn for axes in figure.axes):
        lines = axes.get_lines()
        assert 2 <= len(lines) <= style.MOST_LINES
        assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(lines)
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_legend() is None


def test_adaptations_are_labelled_with_units(drawn):
    adaptation_picture.picture(
        {"lora 80": [[5, 0.2], [10, 0.5]], "full 900": [[5, 1.0], [10, 1.0]]}, "t", True, Path("x")
    )
    (axes,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[20, 50], [100, 100]]
    assert axes.get_ylabel().endswith("(%)")


def _stage(name: str, experts: int, loss: float, layers: int = 2) -> dict:
    return {
        "name": name, "kind": "prune", "experts": experts, "parameters": 10 * experts, "tokens": 0,
        "validation": {"loss": loss, "accuracy": 0.5}, "expert_use": [[1 / experts] * experts] * layers,
    }  # fmt: skip


def test_the_six_panels_and_the_table_of_a_reduction(drawn):
    stages = [_stage("original", 8, 2.0), _stage("half", 4, 2.5)]
    reduction_picture.picture(stages, Path("x"))
    (figure,) = drawn
    assert len([axes for axes in figure.axes if axes.get_label() != "<colorbar>"]) == 6
    np.testing.assert_array_equal(reduction_picture.layers_served([[0.5, 0.5], [1.0, 0.0]]), [2, 1])
    rows = [line.split() for line in reduction_table.table({"": {"stages": stages}}).splitlines()]
    assert rows[-1] == ["half", "4", "40", "2.5000", "+0.5000", "50.00%", "0"]


def test_maps_of_adapters_and_curves_by_tasks(tmp_path):
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(0)
    values = draw.standard_normal((12, 5)) + np.repeat(np.eye(3, 5) * 9, 4, axis=0)
    categories = [name for name in ("sorting", "counting", "naming") for _ in range(4)]
    text_to_lora_pictures.adapter_map(values, categories, [i % 4 == 0 for i in range(12)], tmp_path / "map.png")
    text_to_lora_pictures.by_tasks({"L": {8: 0.1, 16: 0.2}, "S": {8: 0.3}}, "relative L1", tmp_path / "curve.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("map.png", "curve.png"))
