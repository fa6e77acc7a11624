"""The screen of graphs: its actions say what the library says, on a graph of the bundled model; foreign files."""

import copy

import pytest

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.features.store.meta import Label
from cutaway.graphs.opening import around
from cutaway.streams import from_texts
from cutaway.studio.folder import Folder
from cutaway.studio.session import Session

PROMPT, UNITS = "The capital of Norway is", "miniworld/transcoders"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return Session(Folder.of(tmp_path_factory.mktemp("studio")), "miniworld", "miniworld", {"miniworld": "miniworld"})


@pytest.fixture(scope="module")
def traced(session):
    values = {"prompts": PROMPT, "transcoders": UNITS}
    return session.do("run", {"method": "graphs.trace", "values": values})["id"]


@pytest.fixture(scope="module")
def whole(session, traced):
    return ca.open(session.folder.result(traced))


@pytest.fixture(scope="module")
def units(session, traced):
    nodes = session.do("graph", {"graph": traced})["nodes"]
    return [n["name"] for n in sorted(nodes, key=lambda n: -n["influence"]) if n["kind"] == "unit"]


@pytest.mark.parametrize(
    "given", [{}, {"nodes": 0.6, "edges": 0.8}, {"preset": "paper", "pinned": ["latent.0.0@5"]}, {"nodes": 1.0}]
)
def test_a_graph_is_what_prune_makes(session, traced, whole, given):
    page = session.do("graph", {"graph": traced, **given})
    small = ca.graphs.prune(whole, **{k: tuple(v) if k == "pinned" else v for k, v in given.items()})
    assert [n["name"] for n in page["nodes"]] == small.labels["node"]
    assert page["drawn"] | {"error_share": None, "others_share": None} == page["drawn"]
    assert page["drawn"]["replacement"] == small.record["scores"]["replacement"]
    assert page["whole"]["error_share"] == float(whole.error_share)
    names = [n["name"] for n in page["nodes"]]
    drawn = {f"{names[e['source']]}→{names[e['target']]}": e["weight"] for e in page["edges"]}
    known = dict(zip(small.edge_names(), small.weight.tolist(), strict=True))
    assert {k: known[k] for k in drawn} == drawn
    assert len(drawn) + page["hidden"] == len(known)
    influence = dict(zip(small.labels["node"], small.attribute("influence").tolist(), strict=True))
    assert {n["name"]: n["influence"] for n in page["nodes"]} == influence


def test_edges_around_a_node_are_its_row_and_column(session, traced, whole, units):
    said = session.do("node", {"graph": traced, "node": units[0]})
    row = whole.labels["target"].index(units[0])
    inputs = dict(zip(whole.labels["node"], whole.weight[row].tolist(), strict=True))
    assert [(x["node"], x["weight"]) for x in said["inputs"]] == [
        (n, inputs[n]) for n in sorted(inputs, key=lambda n: -abs(inputs[n]))[: len(said["inputs"])]
    ]
    assert said["inputs"][0]["share"] == pytest.approx(abs(said["inputs"][0]["weight"]) / whole.weight[row].abs().sum())
    column = whole.weight[:, whole.labels["node"].index(units[0])]
    assert said["outputs"][0]["weight"] == float(column[column.abs().argmax()])
    assert said["null"] == float(whole.influence_null[whole.labels["node"].index(units[0])].max())
    everything = around(whole, units[0], 10_000)
    assert sum(w for _, w, _ in everything.inputs) == pytest.approx(everything.value, abs=1e-4)


def test_a_store_names_the_units_of_a_graph(session, traced, units):
    assert session.do("node", {"graph": traced, "node": units[0]})["page"] is None
    transcoders, folder = ca.dictionaries.load(UNITS), session.folder.new_store("named")
    made = ca.features.harvest(session.model, {"mlp": transcoders}, from_texts([f"{PROMPT} oslo."] * 3, "one"), folder)
    block, index = map(int, units[0].split("@")[0].split(".")[1:])
    number = transcoders.starts[block] + index
    made.meta.put([Label("mlp", number, "human", "northern capitals")])
    titles = {n["name"]: n["title"] for n in session.do("graph", {"graph": traced})["nodes"] if n["kind"] == "unit"}
    assert {name for name, title in titles.items() if title == "northern capitals"} == {units[0]}
    page = session.do("node", {"graph": traced, "node": units[0]})["page"]
    assert (page["store"], page["dictionary"], page["latent"]) == ("named", "mlp", number)
    row = session.do("latents", {"store": "named", "only": "all", "text": "northern"})["rows"][0]
    assert row["latent"] == number


@pytest.mark.parametrize("prompt", ["The capital of Italy is", "The capital city of Italy is"])
def test_influences_of_two_graphs_are_compared(session, traced, whole, prompt):
    other = session.do("run", {"method": "graphs.trace", "values": {"prompts": prompt, "transcoders": UNITS}})["id"]
    said = session.do("compare_graphs", {"graph": traced, "other": other, "most": 1000})
    second, uneven = ca.open(session.folder.result(other)), len(prompt.split()) != len(PROMPT.split())
    sums = []
    for each in (whole, second):
        counted = ~(each.kinds["constant"] | each.kinds["target"])
        own = {}
        for name, value in zip(each.labels["node"], (each.influence * counted).tolist(), strict=True):
            own[name.split("@")[0] if uneven else name] = own.get(name.split("@")[0] if uneven else name, 0) + value
        sums.append(own)
    for row in said["rows"]:
        a, b = (s.get(row["node"]) for s in sums)
        assert (row["first"], row["second"]) == (a, b)
        assert row["change"] == pytest.approx((a or 0) - (b or 0))
    alone = sum(v for n, v in sums[0].items() if n not in sums[1]) / sum(sums[0].values())
    assert said["first_only"] == pytest.approx(alone)
    assert bool(said["pooled"]) == uneven
    assert [abs(r["change"]) for r in said["rows"]] == sorted((abs(r["change"]) for r in said["rows"]), reverse=True)


def test_groups_are_kept_and_tested(session, traced, units):
    groups = {"one": units[:2], "two": units[2:3]}
    page = session.do("graph", {"graph": traced, "supernodes": groups})
    assert {n["name"]: n["group"] for n in page["nodes"] if n["group"]} == {
        u: g for g, us in groups.items() for u in us
    }
    name = session.do("keep_groups", {"graph": traced, "supernodes": groups})["id"]
    assert page["call"] == {"prompts": PROMPT, "transcoders": UNITS, "nodes": 7500}
    values = {**page["call"], "groups": f"file:{name}", "samples": 1}
    tested = ca.open(session.folder.result(session.do("run", {"method": "graphs.supernodes", "values": values})["id"]))
    assert tested.labels["supernode"] == list(groups)
    checked = ca.graphs.validate(session.model, PROMPT, ca.dictionaries.load(UNITS), top=3, samples=1, rotations=1)
    alone = dict(zip(checked.labels["node"], checked.effect.tolist(), strict=True))
    assert float(tested.effect[1]) == pytest.approx(alone[units[2]], abs=1e-4)


def test_a_graph_goes_out_and_comes_back(session, traced, units):
    asked = {"graph": traced, "nodes": 0.7, "supernodes": {"mine": units[:2]}}
    data = session.do("export_graph", asked)["data"]
    page, name = session.do("graph", asked), session.do("import_graph", {"data": data, "name": "theirs.json"})["id"]
    back = session.do("graph", {"graph": name})
    assert sorted(n["name"] for n in back["nodes"]) == sorted(n["name"] for n in page["nodes"])
    assert len(back["edges"]) == len(page["edges"])
    assert {n["name"] for n in back["nodes"] if n["group"] == "mine"} == set(units[:2])
    assert back["whole"] is None
    assert name in {g["id"] for g in session.do("graphs", {})["graphs"]}


def test_markup_in_a_foreign_graph_is_text(session, traced):
    data = session.do("export_graph", {"graph": traced})["data"]
    data["nodes"][0]["clerp"] = data["metadata"]["prompt_tokens"][0] = "<img src=x onerror=alert(1)>"
    name = session.do("import_graph", {"data": data})["id"]
    page = session.do("graph", {"graph": name})
    assert "<img" not in page["how"]
    assert any("<img" in c for c in page["columns"])  # a text, which the page sets as text


def _broken(data):
    """Yield graph files that are not of the schema, or contradict themselves."""
    for change in (
        lambda d: d.pop("links"),
        lambda d: d["nodes"].append(d["nodes"][0]),
        lambda d: d["links"].append({"source": "nowhere", "target": d["nodes"][0]["node_id"], "weight": 1.0}),
        lambda d: d["nodes"][0].update(ctx_idx=10**6),
        lambda d: d["metadata"].update(prompt_tokens="text"),
    ):
        own = copy.deepcopy(data)
        change(own)
        yield own
    yield {}


def test_foreign_graphs_that_are_broken_are_refused(session, traced):
    data = session.do("export_graph", {"graph": traced})["data"]
    for broken in _broken(data):
        with pytest.raises(Refused):
            session.do("import_graph", {"data": broken})
    assert not list(session.folder.empty.iterdir())


def test_what_is_no_graph_is_refused(session, traced, units):
    imported = session.do("import_graph", {"data": session.do("export_graph", {"graph": traced})["data"]})["id"]
    for action, values in (
        ("graph", {"graph": "../../etc/passwd"}),
        ("graph", {"graph": "file:nothing"}),
        ("graph", {"graph": traced, "preset": "nothing"}),
        ("graph", {"graph": traced, "pinned": ["latent.9.9@9"]}),
        ("graph", {"graph": traced, "supernodes": {"a": [units[0]], "b": [units[0]]}}),
        ("node", {"graph": traced, "node": "nothing"}),
        ("node", {"graph": imported, "node": units[0]}),
        ("export_graph", {"graph": imported}),
    ):
        with pytest.raises(Refused):
            session.do(action, values)
