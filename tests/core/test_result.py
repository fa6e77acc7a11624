"""Results check their shapes, select, rank, compare and travel through files unchanged."""

from dataclasses import dataclass, fields

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.files import write_tensors
from cutaway.core.refuse import Refused
from cutaway.core.render import RENDERERS
from cutaway.core.result import KINDS, Result, open_result


@dataclass(frozen=True, kw_only=True)
class Probe(Result, kind="probe_of_tests"):
    effect: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"] | None = None
    token: Int[Tensor, "layer"]


@dataclass(frozen=True, kw_only=True)
class Other(Result, kind="other_of_tests"):
    effect: Float[Tensor, "layer head"]


def probe(**changes) -> Probe:
    effect = torch.arange(6.0).reshape(2, 3) - 3
    given = {
        "effect": effect,
        "interval": torch.stack([effect - 1, effect + 1], -1),
        "token": torch.tensor([7, 8]),
        "labels": {"head": ["a", "b", "c"], "bound": ["low", "high"], "token": ["seven", "eight"]},
        "units": {"effect": "logit"},
        "record": {"seed": 3, "nested": {"x": [1, None, "é"]}},
    }
    return Probe(**{**given, **changes})


def test_axes_come_from_the_annotations():
    assert probe().axes() == {"effect": ("layer", "head"), "interval": ("layer", "head", "bound"), "token": ("layer",)}
    assert (Probe.schema(), Result.schema()) == (probe().axes(), {})
    assert probe().sizes() == {"layer": 2, "head": 3, "bound": 2}
    assert probe().main == "effect"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effect": torch.zeros(6)}, "shape"),
        ({"interval": torch.zeros(2, 4, 2)}, "head"),
        ({"token": torch.tensor([1, 2, 3])}, "layer"),
        ({"labels": {"head": ["a", "b"]}}, "labels for 'head'"),
        ({"labels": {"nothing": ["a"]}}, "no axis or field"),
        ({"labels": {"token": ["one"]}}, "labels for 'token'"),
    ],
)
def test_wrong_shapes_and_labels_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        probe(**changes)


def test_results_are_frozen():
    with pytest.raises(AttributeError):
        probe().effect = torch.zeros(2, 3)  # type: ignore[misc]


def test_two_classes_of_one_kind_are_an_error():
    with pytest.raises(TypeError, match="kind"):
        type("Second", (Result,), {}, kind="probe_of_tests")
    assert KINDS["probe_of_tests"] is Probe


def test_file_round_trip_keeps_everything(tmp_path):
    before = probe()
    after = open_result(before.save(tmp_path / "deep" / "a.safetensors"))
    assert type(after) is Probe
    for name, t in before.tensors().items():
        assert torch.equal(t, after.tensors()[name])
        assert t.dtype == after.tensors()[name].dtype
    assert (after.labels, after.units, after.record) == (before.labels, before.units, before.record)


def test_absent_optional_field_stays_absent(tmp_path):
    before = probe(interval=None, labels={})
    assert set(before.tensors()) == {"effect", "token"}
    assert open_result(before.save(tmp_path / "a.safetensors")).interval is None  # type: ignore[attr-defined]


def test_open_refuses_strange_files(tmp_path):
    strange = write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "no_such_kind"})
    with pytest.raises(Refused, match="no_such_kind"):
        open_result(strange)
    surplus = write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, {"kind": "probe_of_tests"})
    with pytest.raises(Refused, match="not in probe_of_tests"):
        open_result(surplus)
    with pytest.raises(Refused):
        open_result(tmp_path / "missing.safetensors")


def test_select_by_label_index_and_list():
    one = probe().select(head="b")
    assert one.effect.tolist() == [[-2.0], [1.0]]
    assert one.labels["head"] == ["b"]
    assert one.labels["token"] == ["seven", "eight"]
    two = probe().select(head=["c", 0], layer=-1)
    assert two.effect.tolist() == [[2.0, 0.0]]
    assert two.labels["head"] == ["c", "a"]
    assert two.token.tolist() == [8]
    assert "token" not in two.labels
    assert two.interval is not None
    assert two.interval.shape == (1, 2, 2)


@pytest.mark.parametrize("at", [{"neuron": 0}, {"head": "d"}, {"head": 3}, {"layer": -3}, {"head": 1.5}])
def test_select_refuses_what_is_not_there(at):
    with pytest.raises(Refused):
        probe().select(**at)


def test_a_file_of_other_shapes_is_refused(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", {"effect": torch.zeros(3)}, {"kind": "other_of_tests"})
    with pytest.raises(Refused, match="shapes of other_of_tests"):
        open_result(path)


def test_top_ranks_by_size_and_carries_companions():
    rows = probe().top(2)
    assert [(r["layer"], r["head"], r["effect"]) for r in rows] == [(0, "a", -3.0), (0, "b", -2.0)]
    assert rows[0]["interval"] == [-4.0, -2.0]
    assert probe().top(1, largest=True)[0]["effect"] == 2.0
    assert probe().top(1, largest=False)[0]["effect"] == -3.0
    assert len(probe().top(100)) == 6
    holes = probe(effect=torch.tensor([[float("nan"), 1, 2], [0, 0, 0]]), interval=None, labels={})
    assert holes.top(1)[0]["effect"] == 2.0
    with pytest.raises(Refused):
        probe().top(by="nothing")


def test_frame_is_long_with_a_column_per_axis():
    frame = probe().frame()
    assert list(frame.columns) == ["layer", "head", "effect"]
    assert frame[(frame.layer == 1) & (frame["head"] == "c")].effect.item() == 2.0
    assert len(probe().frame("interval")) == 12


def test_compare_measures_each_field():
    gaps = probe().compare(probe(effect=probe().effect + 0.5))
    assert gaps["effect"]["largest"] == pytest.approx(0.5)
    assert gaps["effect"]["pearson"] == pytest.approx(1.0)
    assert gaps["token"]["largest"] == 0
    with pytest.raises(Refused):
        probe().compare(Other(effect=torch.zeros(2, 3)))
    assert gaps["left out"] == {"interval": "an interval or a null"}
    few = probe(effect=torch.zeros(2, 2), interval=None, labels={})
    with pytest.raises(Refused, match=r"shapes \(2, 3\) and \(2, 2\)"):
        probe().compare(few)


def test_compare_leaves_out_what_is_not_shared_and_says_so():
    holes = probe(effect=probe().effect.index_fill(1, torch.tensor([0]), torch.nan), interval=None, labels={})
    gaps = probe().compare(holes)
    assert gaps["effect"] == {"largest": 0.0, "mean": 0.0, "pearson": pytest.approx(1.0)}
    assert gaps["left out"] == {"interval": "only the first has it"}
    assert holes.compare(probe())["left out"] == {"interval": "only the second has it"}
    assert "left out" not in holes.compare(holes)


def test_an_estimate_with_its_audit_is_compared_with_the_exact_effects():
    from cutaway.interventions.effects import Effects

    x, n = torch.arange(4.0).reshape(2, 2), torch.zeros(3)
    same = {"grid": ("layer", "head"), "interval": torch.zeros(2, 2, 2), "recovered": x}
    exact = Effects(effect=x, null=torch.zeros(2, 2, 4), clean=n, corrupt=n, **same)
    estimate = Effects(effect=x + 1, null=torch.zeros(2, 2, 1), clean=n[:2], corrupt=n[:2], exact=x, **same)
    gaps = estimate.compare(exact)
    assert (gaps["effect"]["mean"], gaps["recovered"]["largest"]) == (1.0, 0.0)
    assert set(gaps["left out"]) == {"interval", "null", "exact", "clean", "corrupt"}
    assert gaps["left out"]["clean"] == "shapes (2,) and (3,)"


def test_to_moves_floats_and_keeps_integers():
    half = probe().to(torch.float16)
    assert half.effect.dtype == torch.float16
    assert half.token.dtype == torch.int64


def test_drawing_goes_through_the_renderers(monkeypatch):
    monkeypatch.setitem(RENDERERS, "figure", lambda result, name, **options: (result.kind, name, options))
    assert probe().plot(title="x") == ("probe_of_tests", "effect", {"title": "x"})
    monkeypatch.delitem(RENDERERS, "notebook", raising=False)
    with pytest.raises(Refused, match="no view"):
        probe()._repr_html_()


def test_every_field_beyond_the_tensors_is_data():
    assert {f.name for f in fields(Result)} == {"grid", "labels", "units", "neutral", "reasons", "record"}


def test_a_field_named_like_its_axis_keeps_both_columns():
    @dataclass(frozen=True, kw_only=True)
    class Named(Result, kind="named_of_tests"):
        score: Float[Tensor, "score"]

    found = Named(score=torch.tensor([0.5, -2.0]), labels={"score": ["FVU", "L0"]})
    try:
        assert found.frame().to_dict("list") == {"score": ["FVU", "L0"], "value": [0.5, -2.0]}
        assert found.top(1) == [{"score": "L0", "value": -2.0}]
    finally:
        KINDS.pop("named_of_tests")


@dataclass(frozen=True, kw_only=True)
class Open(Result, kind="open_of_tests"):
    effect: Float[Tensor, "*cell"]
    null: Float[Tensor, "*cell sample"] | None = None
    metrics: Float[Tensor, "metric *cell"] | None = None


@pytest.mark.parametrize("grid", [(), ("layer",), ("layer", "head"), ("layer", "head", "position")])
def test_an_instance_names_the_axes_of_its_grid(grid, tmp_path):
    shape = (2, 3, 4)[: len(grid)]
    effect = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    found = Open(grid=grid, effect=effect, null=torch.zeros(*shape, 5), metrics=torch.zeros(1, *shape))
    assert Open.schema() == {"effect": ("*cell",), "null": ("*cell", "sample"), "metrics": ("metric", "*cell")}
    assert found.axes() == {"effect": grid, "null": (*grid, "sample"), "metrics": ("metric", *grid)}
    assert found.sizes() == dict(zip(grid, shape, strict=True)) | {"sample": 5, "metric": 1}
    assert list(found.frame().columns) == [*grid, "effect"]
    again = open_result(found.save(tmp_path / "a.safetensors"))
    assert (again.grid, again.sizes()) == (grid, found.sizes())
    if grid:
        assert found.select(layer=1).effect.shape == (1, *shape[1:])
        assert found.to(torch.float64).select(layer=-1).top(1)[0]["layer"] == 0
        with pytest.raises(Refused, match="this is Open over layer"):
            found.compare(Open(grid=("node", *grid[1:]), effect=effect))


@pytest.mark.parametrize("grid", [("layer",), ("layer", "head", "position"), ("layer", "layer")])
def test_a_grid_of_other_axes_is_an_error(grid):
    with pytest.raises(ValueError, match=r"axes \('layer'|own axes"):
        Open(grid=grid, effect=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="own axes"):
        Other(effect=torch.zeros(2, 2), grid=("layer", "head"))


@dataclass(frozen=True, kw_only=True)
class Told(Result, kind="told_of_tests"):
    effect: Float[Tensor, "layer"]
    gap: float
    changed: tuple[int, ...] | None = None
    name: str | None = None


def test_facts_travel_in_the_header(tmp_path):
    found = Told(effect=torch.zeros(2), gap=1.5, changed=(0, 3), reasons={"effect": "one prompt"})
    assert found.facts() == {"gap": 1.5, "changed": (0, 3)}
    again = open_result(found.save(tmp_path / "a.safetensors"))
    assert (again.facts(), again.reasons) == (found.facts(), {"effect": "one prompt"})
    assert again.select(layer=0).facts() == found.facts()


@pytest.mark.parametrize(
    "facts",
    [{}, {"gap": "wide"}, {"gap": True}, {"gap": None}, {"gap": 1.0, "changed": [0.5]}, {"gap": 1.0, "changed": 3},
     {"gap": 1.0, "name": 2}, {"gap": 1.0, "effect": 2}, {"gap": 1.0, "record": {}}, {"gap": 1.0, "more": 1}, [1.0]],
)  # fmt: skip
def test_other_facts_in_a_file_are_refused(facts, tmp_path):
    header = {"kind": Told.kind, "facts": facts, "reasons": {}}
    with pytest.raises(Refused, match="its header is damaged"):
        open_result(write_tensors(tmp_path / "a.safetensors", {"effect": torch.zeros(2)}, header))
