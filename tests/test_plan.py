"""Plans are plain data: they survive JSON, and one after another is the same as both at once."""

from __future__ import annotations

import json

import pytest
from edgepress.errors import InputError
from edgepress.plan import PruningPlan, Unit
from hypothesis import given
from hypothesis import strategies as st

LAYERS, UNITS = 4, 6
UNIT = st.one_of(
    st.builds(Unit, st.sampled_from(["head", "ffn"]), st.integers(0, LAYERS - 1), st.integers(0, UNITS - 1)),
    st.builds(Unit, st.just("block"), st.integers(0, LAYERS - 1), st.just(0)),
)
PLAN = st.frozensets(UNIT, max_size=12).map(PruningPlan)


@given(PLAN)
def test_a_plan_survives_json(plan: PruningPlan) -> None:
    assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def _left(model: list[list[int]], plan: PruningPlan, kind: str) -> list[list[int]]:
    """Brute force: what of ``kind`` is left of a list of layers of unit names."""
    return [
        [unit for index, unit in enumerate(units) if index not in plan.indices(kind, layer)]
        for layer, units in enumerate(model)
        if layer not in plan.blocks
    ]


@given(PLAN, st.data())
def test_plans_compose(first: PruningPlan, data: st.DataObject) -> None:
    model = [[100 * layer + unit for unit in range(UNITS)] for layer in range(LAYERS)]
    left = _left(model, first, "head")
    places = [Unit("head", layer, i) for layer, units in enumerate(left) for i in range(len(units))]
    places += [Unit("block", layer, 0) for layer in range(len(left))]
    if not places:
        return
    second = PruningPlan.of(data.draw(st.lists(st.sampled_from(places), max_size=8)))
    assert _left(model, first.then(second, LAYERS), "head") == _left(left, second, "head")


@given(st.sets(st.integers(0, UNITS - 1)), st.data())
def test_what_a_later_plan_leaves_is_named_by_its_place_before(gone: set[int], data: st.DataObject) -> None:
    first = PruningPlan.of(Unit("ffn", 2, unit) for unit in gone)
    survivors = [unit for unit in range(UNITS) if unit not in gone]
    places = data.draw(st.sets(st.sampled_from(range(len(survivors)))) if survivors else st.just(set()))
    whole = first.then(PruningPlan.of(Unit("ffn", 2, place) for place in places), LAYERS)
    left = whole.left(first, "ffn", 2, len(survivors))
    assert left == [place for place in range(len(survivors)) if place not in places]
    assert whole.left(PruningPlan(), "ffn", 2, UNITS) == [survivors[place] for place in left]


@pytest.mark.parametrize(
    "hostile",
    [
        [],
        {"head": 3},
        {"head": {"x": [0]}},
        {"head": {"0": [-1]}},
        {"head": {"0": ["a"]}},
        {"head": {"0": "12"}},
        {"head": {"0": [1.5]}},
        {"head": {"0": [float("inf")]}},
    ],
)
def test_anything_else_is_refused(hostile: object) -> None:
    with pytest.raises(InputError):
        PruningPlan.from_json(hostile)
