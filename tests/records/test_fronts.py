"""The front of scores over costs: hand-made points whose order is known."""

import pandas as pd
import pytest

from distillbench.records.fronts import fronts

NAMES = {"dataset": "digits", "teacher": "t", "guidance": None, "settings": "", "images": 500, "protocol": "p"}
NAMES |= {"device": "cpu", "status": "ok", "sampling_seed": 0, "budget": "b"}


def table(points):
    """Rows of {(method, nfe): [(score, cost) by training seed]}; a teacher's first pair is its only row."""
    rows = []
    for (method, nfe), pairs in points.items():
        teacher = method.startswith("teacher:")
        for seed, (score, cost) in enumerate(pairs[:1] if teacher else pairs):
            own = {"method": method, "nfe": nfe, "fd": score, "sample_ms": cost, "key": f"{method}{seed}"}
            rows.append(
                NAMES | own | {"training_seed": None if teacher else seed} | ({"budget": ""} if teacher else {})
            )
    return pd.DataFrame(rows)


def places(points, **others):
    (front,) = fronts(table(points), "fd", "lower", "sample_ms", **others)
    return {(one.label): (one.place, one.beaten_by) for one in front.points}


NEAR = [(100.0, 10.0), (100.2, 10.1)]  # score and cost of two seeds


def shifted(score, cost):
    return [(s * score, c * cost) for s, c in NEAR]


def test_points_beyond_the_uncertainty_are_on_the_front_or_off_it():
    found = places({
        ("a", 1): NEAR, ("a", 2): shifted(0.5, 2), ("b", 2): shifted(0.9, 3), ("c", 4): shifted(0.25, 4),
        ("teacher:ddim", 8): shifted(0.1, 8), ("teacher:ddim", 4): shifted(3, 4),
    })  # fmt: skip
    assert found == {
        "a, 1 NFE": ("on", ""), "a, 2 NFE": ("on", ""), "b, 2 NFE": ("off", "a, 2 NFE"), "c, 4 NFE": ("on", ""),
        "teacher:ddim, 8 NFE": ("on", ""), "teacher:ddim, 4 NFE": ("off", "a, 1 NFE"),
    }  # fmt: skip


def test_a_difference_in_cost_within_its_noise_does_not_decide():
    """b is ahead only in the latency, by less than its noise; c is like a in both: unclear, no line goes there."""
    points = {
        ("a", 1): [(100.0, 10.0), (100.2, 12.0)],
        ("b", 1): [(300.0, 9.5), (301.0, 12.2)],
        ("c", 1): [(100.1, 9.9), (100.0, 12.4)],
        ("d", 2): [(50.0, 40.0), (50.1, 48.0)],
    }
    found = places(points)
    assert {found[f"{name}, 1 NFE"] for name in "abc"} == {("unclear", "")}
    assert found["d, 2 NFE"] == ("on", "")


def test_one_seed_places_points_by_their_means_and_says_so():
    rows = table({("a", 1): [(10.0, 1.0)], ("b", 1): [(11.0, 0.9)], ("c", 1): [(11.0, 1.1)]})
    (front,) = fronts(rows, "fd", "lower", "sample_ms")
    assert [(one.label, one.place) for one in front.points] == [
        ("b, 1 NFE", "on"), ("a, 1 NFE", "on"), ("c, 1 NFE", "off"),
    ]  # fmt: skip
    assert "one training seed" in front.said


def test_rows_without_a_cost_are_named_and_groups_are_kept_apart():
    rows = table({("a", 1): NEAR, ("b", 1): shifted(2, 1), ("teacher:ddim", 4): NEAR})
    rows.loc[rows.method == "teacher:ddim", "sample_ms"] = None
    other = table({("a", 1): NEAR}).assign(budget="twice")
    first, second = fronts(pd.concat([rows, other]), "fd", "lower", "sample_ms")
    assert first.left_out == {"teacher:ddim, 4 NFE": "no score"} and first.group["budget"] == "b"
    assert [one.label for one in second.points] == ["a, 1 NFE"] and second.points[0].place == "on"
    higher = fronts(table({("a", 1): NEAR, ("b", 1): shifted(2, 1)}), "fd", "higher", "sample_ms")
    assert {one.label: one.place for one in higher[0].points} == {"a, 1 NFE": "off", "b, 1 NFE": "on"}
    with pytest.raises(ValueError, match="no direction"):
        fronts(rows, "fd", "up", "sample_ms")


def test_each_number_of_evaluations_can_have_its_own_front():
    rows = table({("a", 1): NEAR, ("a", 2): shifted(0.5, 1), ("b", 2): shifted(2, 2)})
    groups = fronts(rows, "fd", "lower", "sample_ms", each_nfe=True)
    assert [(front.group["nfe"], [one.place for one in front.points]) for front in groups] == [
        (1, ["on"]), (2, ["on", "off"]),
    ]  # fmt: skip
