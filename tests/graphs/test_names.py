"""Kept features of a fact's graph on the miniworld: together those at the name fire for its person, by its syllables;
none at the end, and no two, fire for the people of a city.

`pytest -m wide -o junit_family=xunit1 --junitxml FILE` measures and writes the numbers of docs/graphs.md.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import cutaway as ca
from cutaway.core.node import Latent
from cutaway.core.stats import generator, mean_interval, rotation
from cutaway.features.effects import direct_effects
from cutaway.graphs import prune
from cutaway.zoo.miniworld.facts import OBJECTS, RELATIONS, Person

SYLLABLES, END, TEN, DRAWS, CITIES = 3, 3, 10, 5, 5  # places: the syllables of the name are 0 to 2, the end is 3
Feature = tuple[int, int, int]  # place, layer and number
TEXTS = [(relation, template) for relation, templates in RELATIONS.items() for template in templates]


@dataclass(frozen=True)
class Facts:
    """What transcoders read at the names and at the ends of all sentences about some people."""

    model: ca.Model
    people: tuple[Person, ...]

    @cached_property
    def ids(self) -> list[list[int]]:
        return [self.model.tokens(t.format(s=p.name)).ids[0].tolist() for p in self.people for _, t in TEXTS]

    @cached_property
    def names(self) -> Tensor:
        found = [self.model.tokenizer(" " + p.name, add_special_tokens=False)["input_ids"] for p in self.people]
        return torch.tensor(found)

    @cached_property
    def of(self) -> Tensor:
        """The person of each sentence."""
        return torch.arange(len(self.people)).repeat_interleave(len(TEXTS))

    def start(self, ids: list[int], person: int) -> int:
        name = self.names[person].tolist()
        return next(i for i in range(len(ids)) if ids[i : i + SYLLABLES] == name)

    @cached_property
    def read(self) -> Float[Tensor, "text place layer d_model"]:
        layers, width = self.model.shape.n_layers, self.model.shape.d_model
        out, sites = torch.empty(len(self.ids), END + 1, layers, width), [f"mlp_in.{i}" for i in range(layers)]
        lengths = torch.tensor([len(one) for one in self.ids])
        for length in lengths.unique().tolist():
            for rows in (lengths == length).nonzero()[:, 0].split(512):
                acts = self.model.capture(torch.tensor([self.ids[i] for i in rows.tolist()]), sites, logits=False)
                at = torch.tensor([self.start(self.ids[i], int(self.of[i])) for i in rows.tolist()])
                places = torch.cat([at[:, None] + torch.arange(SYLLABLES), torch.full_like(at[:, None], length - 1)], 1)
                for layer, site in enumerate(sites):
                    out[rows, :, layer] = acts[site].gather(1, places[..., None].expand(-1, -1, width))
        return out

    def active(self, d: ca.dictionaries.Dictionary) -> Bool[Tensor, "text place layer latent"]:
        blocks = range(len(d.blocks))
        found = [d.encode({f"mlp_in.{i}": self.read[:, :, i].flatten(0, 1)}, i).dense() > 0 for i in blocks]
        return torch.stack(found, 1).view(*self.read.shape[:3], -1)


def rotated(d: ca.dictionaries.Dictionary, seed: int) -> ca.dictionaries.Dictionary:
    """Transcoders that read random directions."""
    g = generator(seed)
    turned = tuple({s: w @ rotation(w.shape[1], g) for s, w in rows.items()} for rows in d.encoder)
    return replace(d, encoder=turned, made=None)


def scores(fires: Bool[Tensor, "text"], wanted: Bool[Tensor, "text"]) -> Float[Tensor, "measure"]:
    """Precision, recall and F1."""
    both, said, there = (float(x.sum()) for x in (fires & wanted, fires, wanted))
    return torch.tensor([both / max(said, 1), both / there, 2 * both / (said + there)])


def together(active: Bool[Tensor, "text place layer latent"], features: list[Feature]) -> Bool[Tensor, "text"]:
    """True where all of these features are active, of which there is at least one."""
    if not features:
        return torch.zeros(len(active), dtype=torch.bool)
    return active[(slice(None), *torch.tensor(features).T)].all(1)


@dataclass(frozen=True)
class Graph:
    """The features of a fact's graph, those that are kept by their influence."""

    person: int
    template: int
    kept: list[Feature]
    every: list[Feature]

    @classmethod
    def of(cls, facts: Facts, d: ca.dictionaries.Dictionary, person: int, template: int) -> Graph:
        text = RELATIONS["city"][template].format(s=facts.people[person].name)
        whole = ca.graphs.trace(facts.model, text, d, samples=1)
        assert whole.target_words[0].strip() == facts.people[person].facts["city"].lower(), "the model knows it"
        start, end = facts.start(list(whole.ids), person), len(whole.ids) - 1
        places = {**{start + i: i for i in range(SYLLABLES)}, end: END}
        influence = dict(zip(whole.labels["node"], whole.influence.tolist(), strict=True))
        units = [n for n in prune(whole).nodes if isinstance(n, Latent) and n.position in places]
        units.sort(key=lambda n: -influence[str(n)])
        every = [n for n in whole.nodes if isinstance(n, Latent) and n.position in places]
        kept, every = ([(places[n.position or 0], n.block, n.index) for n in some] for some in (units, every))
        return cls(person, template, kept, every)

    def at(self, *places: int) -> list[Feature]:
        return [f for f in self.kept if f[0] in places]

    def alike(self, features: list[Feature], rng: random.Random) -> list[Feature]:
        """As many active features of each place."""
        counts = Counter(f[0] for f in features)
        return [f for place, n in counts.items() for f in rng.sample([f for f in self.every if f[0] == place], n)]


def graphs(facts: Facts, number: int, *some: ca.dictionaries.Dictionary) -> list[tuple[Graph, ...]]:
    """Graphs of people's cities, of templates that training has shown, over each of some transcoders."""
    rng, out = random.Random(0), []
    for person in rng.sample(range(len(facts.people)), number):
        template = rng.choice([k for k in range(4) if k != facts.people[person].held_out_template["city"]])
        out.append(tuple(Graph.of(facts, d, person, template) for d in some))
    return out


def of_persons(facts: Facts, active: Tensor, chosen: Sequence[Graph]) -> dict[str, Tensor]:
    """Scores of conjunctions for the person, on all sentences but the graph's own, [fact measure]."""
    rng, tokens, out = random.Random(0), facts.names[facts.of], dict[str, list[Tensor]]()
    for graph in chosen:
        others = torch.arange(len(active)) != graph.person * len(TEXTS) + graph.template
        wanted = (facts.of == graph.person)[others]
        sets = {"name": graph.at(0, 1, 2), "ten": graph.at(0, 1, 2)[:TEN], "last": graph.at(2)}
        for name, features in sets.items():
            random_sets = [graph.alike(features, rng) for _ in range(DRAWS)]
            found = [scores(together(active, one)[others], wanted) for one in (features, *random_sets)]
            out.setdefault(name, []).append(found[0])
            out.setdefault(f"{name}, random", []).append(torch.stack(found[1:]).mean(0))
        same = tokens[others] == facts.names[graph.person]
        for name, first in (("three tokens", 0), ("two tokens", 1), ("one token", 2)):
            out.setdefault(name, []).append(scores(same[:, first:].all(1), wanted))
        sizes = [len(features) for features in (sets["name"], sets["last"], graph.every)]
        out.setdefault("sizes", []).append(torch.tensor(sizes).float())
    return {name: torch.stack(rows) for name, rows in out.items()}


def of_cities(
    facts: Facts, active: Tensor, chosen: Sequence[Graph], raised: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """F1 for the people of the city, on one half of the people, of the feature or pair that is best on the other, and
    the share of features that raise this city most of all, [fact].
    """
    asks = torch.tensor([relation == "city" for relation, _ in TEXTS]).repeat(len(facts.people))
    active, people, rng, out = active[asks], facts.of[asks], random.Random(0), dict[str, list[float]]()
    for graph in chosen:
        city = facts.people[graph.person].facts["city"]
        lives = torch.tensor([p.facts["city"] == city for p in facts.people])[people]
        others = people != graph.person
        for place, name in ((END, "end"), (2, "last syllable")):
            kept = graph.at(place)
            for kind, features in (("", kept), (", random", graph.alike(kept, rng))):
                on = torch.stack([active[:, *f] for f in features] or [torch.zeros(len(active)).bool()], 1)
                one = held_out(on[others].float(), lives[others].float(), people[others] % 2 == 0)
                out.setdefault(f"{name}{kind}", []).append(one[0])
                out.setdefault(f"{name}, pair{kind}", []).append(one[1])
                if place == END:
                    hits = [raised[layer][i] == OBJECTS["city"].index(city) for _, layer, i in features]
                    out.setdefault(f"raised{kind}", []).append(sum(map(float, hits)) / max(len(hits), 1))
        base = float(lives[others].float().mean())
        out.setdefault("always", []).append(2 * base / (1 + base))
    return {name: torch.tensor(rows) for name, rows in out.items()}


def city_raised(model: ca.Model, d: ca.dictionaries.Dictionary) -> list[list[int]]:
    """The city that each latent raises most, by layer."""
    ids = [model.tokenizer(" " + c, add_special_tokens=False)["input_ids"][0] for c in OBJECTS["city"]]
    effects = [direct_effects(model, rows[f"mlp_out.{i}"].float()) for i, rows in enumerate(d.decoder)]
    return [x[:, ids].argmax(1).tolist() for x in effects]


def held_out(on: Float[Tensor, "text feature"], wanted: Float[Tensor, "text"], half: Tensor) -> tuple[float, float]:
    """F1 of the feature, and of the pair, that is best on the other half; mean over both ways."""
    pairs = torch.combinations(torch.arange(on.shape[1]), 2)
    out = []
    for columns in (on, on[:, pairs[:, 0]] * on[:, pairs[:, 1]]):
        one, other = (
            2 * (wanted[h] @ columns[h]) / (wanted[h].sum() + columns[h].sum(0)).clamp_min(1) for h in (half, ~half)
        )
        out.append(float(other[one.argmax()] + one[other.argmax()]) / 2 if columns.shape[1] else 0.0)
    return out[0], out[1]


@dataclass(frozen=True)
class Found:
    """Scores for persons and cities: means, and whether differences exceed 0 by their interval over facts."""

    person: dict[str, Tensor]
    city: dict[str, Tensor]

    @classmethod
    def of(cls, facts: Facts, d: ca.dictionaries.Dictionary, chosen: Sequence[Graph]) -> Found:
        active = facts.active(d)
        return cls(of_persons(facts, active, chosen), of_cities(facts, active, chosen, city_raised(facts.model, d)))

    def f1(self, name: str) -> Tensor:
        """F1 of a set of features for the person, by fact."""
        return self.person[name][:, 2]


def interval(values: Tensor) -> tuple[float, float]:
    low, high = mean_interval(values).tolist()
    return low, high


@pytest.fixture(scope="module")
def shipped():
    return ca.dictionaries.load("miniworld/transcoders")


def test_kept_features_of_a_name_fire_together_for_the_person_and_those_of_the_end_for_no_city(shipped):
    model = ca.load("miniworld")
    most = [city for city, _ in Counter(p.facts["city"] for p in model.world.people).most_common(CITIES)]
    facts = Facts(model, tuple(p for p in model.world.people if p.facts["city"] in most))
    found = Found.of(facts, shipped, [one for (one,) in graphs(facts, 8, shipped)])
    assert float(found.f1("name").mean()) > 0.7
    assert interval(found.f1("ten") - found.f1("ten, random"))[0] > 0
    assert bool((found.f1("three tokens") == 1).all()), "no two people have one name"
    assert float(found.f1("one token").mean()) < float(found.f1("last").mean()) < float(found.f1("two tokens").mean())
    for name in ("end", "end, pair"):
        assert interval(found.city[name] - found.city["always"])[1] < 0.1, "hardly better than yes to everybody"


@pytest.mark.wide
def test_the_person_is_no_more_than_its_syllables_and_the_city_no_feature(shipped, record_property):
    model = ca.load("miniworld")
    facts, chance = Facts(model, model.world.people), rotated(shipped, 0)
    both = zip(*graphs(facts, 40, shipped, chance), strict=True)
    ours, theirs = (Found.of(facts, d, one) for d, one in zip((shipped, chance), both, strict=True))
    for name, found in (("shipped", ours), ("rotated", theirs)):
        for what, values in (found.person | found.city).items():
            record_property(f"{name}: {what}", [values.mean(0).tolist(), mean_interval(values).tolist()])

    def lead(what: str, a: Tensor, b: Tensor) -> tuple[float, float]:
        record_property(what, [float((a - b).mean()), interval(a - b)])
        return interval(a - b)

    name, ten, last = (ours.f1(one) for one in ("name", "ten", "last"))
    assert lead("name − random", name, ours.f1("name, random"))[0] > 0
    assert lead("name − rotated", name, theirs.f1("name"))[0] > 0
    low, high = lead("ten − rotated", ten, theirs.f1("ten"))
    assert low < 0 < high, "as many that read random directions name the person, too"
    assert lead("last − random", last, ours.f1("last, random"))[0] < 0
    assert lead("last − rotated", last, theirs.f1("last"))[0] < 0
    assert lead("last − two tokens", last, ours.f1("two tokens"))[1] < 0, "syllables say more"
    assert interval(ours.city["end"])[1] < 0.2
    for what in ("end", "end, pair", "last syllable", "last syllable, pair", "raised"):
        assert lead(f"{what} − rotated", ours.city[what], theirs.city[what])[0] < 0, "none is of the city"
