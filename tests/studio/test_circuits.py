"""Circuits on the screen of graphs: scores, drawing and truth are those of the library, on a compiled program."""

import pytest
import torch

import cutaway as ca
from cutaway.circuits.components import belongs
from cutaway.core.refuse import Refused
from cutaway.interventions.edge_truth import identifiable
from cutaway.models.edits.wiring import wiring
from cutaway.studio.folder import Folder
from cutaway.studio.session import Session
from cutaway.zoo.compiled import structural

MODEL, TASK = "compiled/histogram", {"task": "histogram", "task_n": 4}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = Folder.of(tmp_path_factory.mktemp("studio"))
    return Session(folder, "program", MODEL, {"program": MODEL, "miniworld": "miniworld"})


@pytest.fixture(scope="module")
def scored(session):
    return session.do("run", {"method": "circuits.exact", "values": TASK | {"samples": 2}})["id"]


@pytest.fixture(scope="module")
def scores(session, scored):
    return ca.open(session.folder.result(scored))


def test_a_circuit_is_the_first_edges_between_components(session, scored, scores):
    (card,) = session.do("circuits", {})["circuits"]
    assert card == {"id": scored, "method": "circuits.exact", "task": "histogram, 4 prompts"}
    page = session.do("circuit", {"circuit": scored, "edges": 9})
    order = scores.score.abs().argsort(descending=True, stable=True)[:9].tolist()
    drawn = {e["name"]: e for e in page["edges"] if e["known"] != "missed"}
    assert list(drawn) == [scores.labels["edge"][i] for i in order]
    assert [e["weight"] for e in drawn.values()] == scores.score[order].tolist()
    assert [list(e["interval"]) for e in drawn.values()] == scores.interval[order].tolist()
    w, names = wiring(session.model), [n["name"] for n in page["nodes"]]
    of, readers = belongs(w), [str(v) for v in w.readers]
    for name, edge in drawn.items():
        writer, reader = name.split("→")
        assert names[edge["source"]] == writer
        own = of[:, readers.index(reader)].nonzero()[:, 0].tolist()
        assert names[edge["target"]] in ([str(w.writers[u]) for u in own] or [reader])


@pytest.mark.parametrize("truth", ["structural", "identifiable"])
def test_the_truth_is_that_of_the_program_and_its_prompts(session, scored, truth):
    model, w = session.model, wiring(session.model)
    task = ca.tasks.load("histogram", model, n=4)
    program = structural(model, w)[w.pairs[:, 0], w.pairs[:, 1]]
    mask = program if truth == "structural" else identifiable(model, task, w)
    true = {str(e) for e, x in zip(w.edges, mask.tolist(), strict=True) if x}
    page = session.do("circuit", {"circuit": scored, "truth": truth, "edges": 3})
    assert set(page["truths"][truth]) == true
    assert {e["name"] for e in page["edges"] if e["known"] in ("found", "missed")} == true
    assert session.do("circuit", {"circuit": scored, "truth": truth})["inside"] == len(true)


def test_its_call_evaluates_the_ranking_on_its_task(session, scored, scores):
    page = session.do("circuit", {"circuit": scored})
    shown = session.do("run", {"method": "circuits.faithfulness", "values": page["call"] | {"samples": 2}})
    task = ca.tasks.load("histogram", session.model, n=4)
    own = ca.circuits.faithfulness(session.model, task, ca.circuits.open(scores), samples=2)
    found = ca.open(session.folder.result(shown["id"]))
    torch.testing.assert_close(found.faithfulness, own.faithfulness)
    truth = ",".join(page["truths"]["identifiable"])
    values = {"circuit": page["call"]["circuit"], "reference": truth}
    found = ca.open(session.folder.result(session.do("run", {"method": "circuits.compare", "values": values})["id"]))
    assert found.auroc[0] == 1


def test_other_results_and_models_are_refused(session, scored, miniworld):
    traced = session.do("run", {"method": "lenses.logit_lens", "values": {"prompts": "a b c"}})["id"]
    for name in (traced, "nothing", "file:nothing", "../../etc/passwd"):
        with pytest.raises(Refused):
            session.do("circuit", {"circuit": name})
    other = Session(session.folder, "miniworld", "miniworld", session.others)
    other.__dict__["model"] = miniworld
    assert other.do("circuits", {})["circuits"] == []
    shown = other.do("run", {"method": "circuits.random", "values": {}})["id"]
    page = other.do("circuit", {"circuit": shown})
    assert (page["call"], page["task"]) == ({"circuit": f"file:{shown}"}, "no task")
    assert (page["truths"], page["inside"], {e["known"] for e in page["edges"]}) == ({}, 20, {""})
    with pytest.raises(Refused, match="model has no edge"):
        session.do("circuit", {"circuit": shown})
