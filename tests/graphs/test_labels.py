"""Labels of a graph's features from a store: on the miniworld they name the relation of a fact and syllables of its
person, where random directions of reading name mixtures; other transcoders are refused.
"""

import json
import re
from dataclasses import replace

import pytest

import cutaway as ca
from cutaway.core.node import Latent
from cutaway.core.stats import generator, rotation
from cutaway.graphs import prune, store_labels
from cutaway.streams import from_texts
from cutaway.zoo.miniworld.facts import RELATIONS
from cutaway.zoo.miniworld.words import SYLLABLES

PEOPLE, ASKED = 30, ("city", "job", "instrument")


@pytest.fixture(scope="module")
def world():
    return ca.load("miniworld")


@pytest.fixture(scope="module")
def shipped():
    return ca.dictionaries.load("miniworld/transcoders")


def harvested(model, d, folder):
    """A store of facts about people."""
    people = model.world.people[:PEOPLE]
    texts = [f"{t.format(s=p.name)} {p.facts[r]}." for p in people for r, ts in RELATIONS.items() for t in ts]
    return ca.features.harvest(model, {"facts": d}, from_texts(texts, "facts"), folder)


@pytest.fixture(scope="module")
def store(world, shipped, tmp_path_factory):
    return harvested(world, shipped, tmp_path_factory.mktemp("labels") / "store")


def labelled(model, d, store, person, relation):
    """The main nodes of a fact's graph with what each label quotes: those at its name, and those at its end."""
    template = next(t for k, t in enumerate(RELATIONS[relation]) if k != person.held_out_template[relation])
    whole = ca.graphs.trace(model, template.format(s=person.name), d, samples=1)
    nodes = [n for n in prune(whole).nodes if isinstance(n, Latent)]
    ca.features.explain(store, [768 * n.block + n.index for n in nodes], dictionary="facts", samples=1)
    labels = store_labels(whole, store, d)
    end = len(whole.words) - 1
    said = [(n, [q.strip() for q in re.findall("“(.*?)”", labels[str(n)])]) for n in nodes if str(n) in labels]
    name = [(q, whole.words[n.position].strip().lower()) for n, q in said if 0 < n.position <= 3]
    return name, [q for n, q in said if n.position == end]


def of_relation(quotes, relation):
    """Whether a label speaks of words of a relation's templates and of nothing else."""
    words = {w for t in RELATIONS[relation] for w in t.format(s="").lower().split()}
    return bool(quotes) and {w for q in quotes for w in q.split()} <= words


def test_labels_name_the_relation_and_the_syllables_of_the_person_and_random_readings_do_not(
    world, shipped, store, tmp_path
):
    ends = names = 0
    relations, syllables = [], []
    for person, relation in zip(world.world.people, ASKED, strict=False):
        name, end = labelled(world, shipped, store, person, relation)
        relations.append(sum(of_relation(q, relation) for q in end))
        syllables.append(sum(word in q and set(q) <= set(SYLLABLES) for q, word in name))
        ends, names = ends + len(end), names + len(name)
    assert min(relations) > 0, "each graph has features that name its relation"
    g = generator(0)
    rotated = tuple({s: w @ rotation(128, g) for s, w in rows.items()} for rows in shipped.encoder)
    chance = replace(shipped, encoder=rotated, made=None)
    name, end = labelled(world, chance, harvested(world, chance, tmp_path / "store"), world.world.people[0], ASKED[0])
    assert sum(relations) / ends > 5 * sum(of_relation(q, ASKED[0]) for q in end) / len(end)
    assert sum(syllables) / names > 2 * sum(w in q and set(q) <= set(SYLLABLES) for q, w in name) / len(name)


def test_labels_are_drawn_and_exported(world, shipped, store, tmp_path, capsys):
    from cutaway.cli import app

    graph, page, file = (str(tmp_path / n) for n in ("g.safetensors", "g.html", "g.json"))
    text = f"{world.world.people[0].name} lives in"
    whole = ca.graphs.trace(world, text, shipped, samples=1)
    whole.save(graph)
    ca.features.explain(store, [768 * 2 + 603], dictionary="facts", samples=1)
    label = store_labels(whole, store, shipped)["latent.2.603@5"]
    assert "lives" in label
    assert app.main(["graphs", "show", graph, "--store", str(store.folder), "--out", page]) == 0
    assert app.main(["graphs", "export", graph, "--store", str(store.folder), "--out", file]) == 0
    assert label in [n["clerp"] for n in json.loads((tmp_path / "g.json").read_text("utf-8"))["nodes"]]
    assert f"<title>latent.2.603@5 {label}</title>" in (tmp_path / "g.html").read_text("utf-8")
    capsys.readouterr()
    ca.graphs.trace(world, text, "neurons", nodes=20, samples=1).save(graph)
    assert app.main(["graphs", "show", graph, "--store", str(store.folder)]) == 2
    assert "harvest the graph's transcoders" in " ".join(capsys.readouterr().err.split())


def test_other_transcoders_are_refused(world, shipped, store):
    whole = ca.graphs.trace(world, "The capital of Norway is", shipped, samples=1)
    other = replace(shipped, b_enc=tuple(b + 1 for b in shipped.b_enc), made=None)
    with pytest.raises(ca.Refused, match="over other transcoders"):
        store_labels(whole, store, other)
    with pytest.raises(ca.Refused, match="not harvested with"):
        store_labels(replace(whole, record={}), store, other)
