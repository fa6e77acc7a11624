"""The world is one truth: built from a seed, read from JSON, and held apart where it says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cutaway.core.refuse import Refused
from cutaway.zoo.miniworld import World
from cutaway.zoo.miniworld.facts import RELATIONS
from cutaway.zoo.miniworld.prompts import BEHAVIOURS

MANY = {"capital": 24, "language": 24, "city_country": 40, "successor": 50, "refusal": 60, "compliance": 60,
        "agreement": 40, "gender": 50}  # fmt: skip


def test_the_shipped_world_is_the_one_of_its_seed(world):
    built = World.build(world.seed)
    assert built.people == world.people
    assert built.countries == world.countries
    assert built.unknown_people == world.unknown_people
    assert {k: [tuple(p) for p in v] for k, v in world.held_out_lists.items()} == built.held_out_lists


def test_saving_and_loading_gives_the_same_world(world, tmp_path):
    world.save(tmp_path / "world.json")
    assert World.load(tmp_path / "world.json") == world


def test_size_promised(world):
    assert len(world.people) >= 200
    assert all(set(p.facts) == set(RELATIONS) for p in world.people)
    assert len(world.countries) >= 20
    assert len({p.name for p in world.people} | set(world.unknown_people)) == len(world.people) + len(
        world.unknown_people
    )


def test_two_hop_fact_is_the_composition(world):
    for person in world.people:
        assert world.fact(person.name, "country") == world.country_of_city[world.fact(person.name, "city")]
        assert all(person.counterfactual[r] != person.facts[r] for r in RELATIONS)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_prompts_are_distinct_split_and_of_equal_length(world, tokenizer, behaviour):
    prompts = world.prompts(behaviour, 120, seed=3)
    assert len(prompts) >= MANY.get(behaviour, 120)
    assert all(p.held_out and p.behaviour == behaviour for p in prompts)
    assert len({(p.clean, p.answer) for p in prompts}) == len(prompts)
    for p in prompts:
        clean, corrupt = tokenizer.encode(p.clean).ids, tokenizer.encode(p.corrupt).ids
        answer, foil = tokenizer.encode(p.clean + p.answer).ids, tokenizer.encode(p.corrupt + p.foil).ids
        assert len(clean) == len(corrupt)
        assert clean != corrupt
        assert answer[: len(clean)] == clean
        assert foil[: len(clean)] == corrupt
        assert len(answer) == len(foil)
        assert p.answer != p.foil
        if p.subject is not None:
            start, end = p.subject
            assert 0 <= start < end <= len(p.clean)


def test_a_prompt_without_text_order_is_the_same_each_time(world):
    assert world.prompts("ioi", 20, seed=1) == world.prompts("ioi", 20, seed=1)
    assert world.prompts("ioi", 20, seed=1) != world.prompts("ioi", 20, seed=2)


def test_train_and_test_prompts_do_not_meet(world):
    train = {p.clean for p in world.prompts("addition", 500, split="train")}
    test = {p.clean for p in world.prompts("addition", 300, split="test")}
    assert not train & test
    listed = {tuple(p) for p in world.held_out_lists["addition"]}
    assert all((p.meta["a"], p.meta["b"]) in listed for p in world.prompts("addition", 300))


def test_subjects_and_answers_are_true(world):
    for p in world.prompts("fact", 100, split="any"):
        assert p.answer == f" {world.fact(p.meta['subject'], p.meta['relation'])}"
        start, end = p.subject
        assert p.clean[start:end] == p.meta["subject"]
    for p in world.prompts("two_hop", 50):
        assert p.answer == f" {world.fact(p.meta['subject'], 'country')}"
        assert world.person[p.meta["subject"]].two_hop_held_out
    for p in world.prompts("subtraction", 50):
        assert int(p.answer) == p.meta["a"] - p.meta["b"]


def test_samplers_leave_the_global_generator_alone():
    code = (
        "import random; from cutaway.zoo.miniworld import World; from cutaway.zoo.miniworld.prompts import BEHAVIOURS;"
        "before = random.getstate(); world = World.load();"
        "[sampler(world, random.Random(0), True) for sampler in BEHAVIOURS.values()];"
        "raise SystemExit(random.getstate() != before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_behaviour_is_refused(world):
    with pytest.raises(Refused, match="ioi"):
        world.prompts("chess")


def test_import_stays_light():
    code = (
        "import sys; from cutaway.zoo import miniworld as m; m.World.load().prompts('ioi', 3); m.path();"
        "bad = {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
