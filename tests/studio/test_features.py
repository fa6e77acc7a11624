"""The screen of features: its actions say what the library says, on a small harvest of the bundled model."""

import pytest

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.features import search
from cutaway.studio.folder import Folder
from cutaway.studio.session import Session

DICTIONARY, TEXT = "miniworld/resid_post.3", "The capital of Norway is"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A studio with one store, which a job of it has harvested."""
    made = Session(Folder.of(tmp_path_factory.mktemp("studio")), "miniworld", "miniworld", {"miniworld": "miniworld"})
    made.do("harvest", {"dictionary": DICTIONARY, "tokens": 2000})
    return made


@pytest.fixture(scope="module")
def at(session):
    (store,) = session.do("stores", {})["stores"]
    assert store["opened"] == {"resid_post.3": DICTIONARY}
    return {"store": store["id"], "dictionary": "resid_post.3"}


@pytest.fixture(scope="module")
def store(session, at):
    return ca.features.FeatureStore(session.folder.store(at["store"]))


@pytest.fixture(scope="module")
def busiest(store):
    return int(store.latents().count.argmax())


def test_the_table_has_the_numbers_of_the_store(session, at, store):
    page = session.do("latents", {**at, "most": 10})
    known = store.latents()
    for row in page["rows"]:
        assert row["density"] == pytest.approx(float(known.density[row["latent"]]))
        assert row["largest"] == pytest.approx(float(known.tensors["largest"][row["latent"]]))
    assert page["total"] == int((known.count > 0).sum())
    after = session.do("latents", {**at, "most": 10, "after": page["next"]})
    assert after["rows"][0]["density"] <= page["rows"][-1]["density"]


@pytest.mark.parametrize(
    ("query", "by"),
    [
        ("token", lambda s, m, d: search.by_label(s, "token", 30)),
        ('token:" the"', lambda s, m, d: search.by_peak_token(s, " the", most=30)),
        ("phrase:the city", lambda s, m, d: search.by_phrase(s, "the city", most=30)),
        (f'fires-on:"{TEXT}"', lambda s, m, d: search.by_text(s, TEXT, m, d, most=30)),
        ("raises:oslo", lambda s, m, d: search.by_raised_word(s, "oslo", m, d, most=30)),
        ("like:17", lambda s, m, d: search.by_likeness(s, 17, d, most=30)),
    ],
)
def test_searches_find_what_the_library_finds(session, at, store, query, by):
    hits = session.do("find", {**at, "query": query})["hits"]
    found = by(store, session.model, ca.dictionaries.load(DICTIONARY))
    assert hits
    assert [(h["latent"], h["why"]) for h in hits] == [(h.latent, h.why) for h in found]


def test_the_page_of_a_latent_is_its_card(session, at, store, busiest):
    page = session.do("feature", {**at, "latent": busiest})
    card = ca.features.card(store, busiest, session.model, ca.dictionaries.load(DICTIONARY), contexts=0)
    assert [s["value"] for s in page["strips"]] == card.activation.tolist()
    tokens = page["strips"][0]["tokens"]
    assert [t["text"] for t in tokens] == card.labels["window"][0]
    assert tokens[page["strips"][0]["peak"]]["value"] == pytest.approx(page["row"]["largest"], rel=1e-3)
    assert {"histogram", "raises", "neighbour"} <= {d["field"] for d in page["shown"]["drawings"]}
    again = eval(page["shown"]["python"], {"ca": ca})
    assert again.raises.tolist() == pytest.approx(card.raises.tolist())


def test_a_text_is_read_by_one_latent_and_by_all(session, at, store, busiest):
    said = session.do("read", {**at, "text": TEXT, "latent": busiest, "top": 3})
    d = ca.dictionaries.load(DICTIONARY)
    code = d.encode(session.model.capture(TEXT, "resid_post.3")["resid_post.3"][0]).dense()
    assert [t["value"] for t in said["tokens"]] == pytest.approx(code[:, busiest].tolist(), abs=1e-5)
    for token, row in zip(said["tokens"], code, strict=True):
        assert token["active"] == int((row != 0).sum())
        assert all(a["value"] == pytest.approx(float(row[a["latent"]]), abs=1e-5) for a in token["top"])


def test_two_texts_are_read_and_compared_token_by_token(session, at, busiest):
    other = TEXT.replace("Norway", "Italy")
    said = session.do("read", {**at, "text": TEXT, "other": other, "latent": busiest, "top": 3})
    alone = session.do("read", {**at, "text": other, "latent": busiest, "top": 3})
    assert list(said["other"]) == alone["tokens"]
    d = ca.dictionaries.load(DICTIONARY)
    a, b = (d.encode(session.model.capture(t, "resid_post.3")["resid_post.3"][0]).dense() for t in (TEXT, other))
    assert [t["value"] for t in said["difference"]] == pytest.approx((a - b)[:, busiest].tolist(), abs=1e-5)
    for t, token in enumerate(said["difference"]):
        for x in token["top"]:
            assert (x["value"], x["other"]) == pytest.approx(
                (float(a[t, x["latent"]]), float(b[t, x["latent"]])), abs=1e-5
            )
            assert x["change"] == pytest.approx(x["value"] - x["other"], abs=1e-5)
        assert [x["share"] for x in token["top"]] == sorted((x["share"] for x in token["top"]), reverse=True)
    uneven = session.do("read", {**at, "text": TEXT, "other": f"{TEXT} the"})
    assert not uneven["difference"]
    assert "do not line up" in uneven["apart"]


def test_a_latent_is_a_direction_that_steering_opens(session, at, store, busiest):
    made = session.do("direction", {**at, "latent": busiest})
    found = ca.directions.open(session.folder.placed("direction", f"file:{made['id']}"))
    own = ca.dictionaries.load(DICTIONARY).direction(busiest)
    assert found.vector[0].tolist() == pytest.approx((own * made["step"]).tolist())
    assert made["step"] == pytest.approx(float(store.latents().mean()[busiest]))


def test_jobs_are_results_of_the_library(session, at, store, busiest):
    shown = session.do("causal_card", {**at, "latent": busiest, "contexts": 2, "samples": 1})
    card = ca.open(session.folder.result(shown["id"]))
    own = ca.features.card(
        store, busiest, session.model, ca.dictionaries.load(DICTIONARY), contexts=2, samples=1, seed=0
    )
    assert card.change.tolist() == pytest.approx(own.change.tolist(), abs=1e-5)
    session.do("harvest", {"dictionary": DICTIONARY, "tokens": 2000, "seed": 1})
    (other,) = [s["id"] for s in session.do("stores", {})["stores"] if s["id"] != at["store"]]
    shown = session.do("compare_stores", {**at, "second_store": other, "samples": 1})
    matched = ca.features.compare(store, ca.features.FeatureStore(session.folder.store(other)), samples=1)
    assert ca.open(session.folder.result(shown["id"])).jaccard.tolist() == matched.jaccard.tolist()


def test_what_is_not_there_is_refused(session, at):
    for action, values in (
        ("latents", {"store": "../../etc"}),
        ("latents", {**at, "after": "x"}),
        ("feature", {**at, "latent": 10**6}),
        ("find", {**at, "query": "like:x"}),
        ("harvest", {"dictionary": "/etc/passwd"}),
        ("read", {**at, "dictionary": "none", "text": "a"}),
    ):
        with pytest.raises(Refused):
            session.do(action, values)
