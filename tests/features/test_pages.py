"""Feature pages of circuit-tracer: those of the activations, the same back from both forms, and what is refused."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from cutaway.core.cantor import cantor
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.transforms import autoencoder, one_block, together
from cutaway.features import harvest
from cutaway.features.formats import circuit_tracer as pages
from cutaway.features.formats.neuronpedia import Export
from cutaway.streams import from_texts
from tests.features.common import KEEP, MASKING, PACKING, brute, dictionaries, found, model, texts

EXPORT = Export("random-llama", "some-24")


def transcoders() -> Dictionary:
    """Six latents of the first MLP and five of the second."""
    g = torch.Generator().manual_seed(5)
    parts = []
    for layer, n in ((0, 6), (1, 5)):
        rows, written = (torch.randn(n, 32, generator=g) for _ in range(2))
        sites = f"mlp_in.{layer}", f"mlp_out.{layer}"
        parts.append(one_block({sites[0]: rows}, {sites[1]: written}, torch.zeros(n), {sites[1]: written[0]}, Relu()))
    return together(parts)


@pytest.fixture(scope="module")
def loose(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "loose"
    return pages.write_pages(store, out, EXPORT, model(), dictionaries()["some"], dictionary="some")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out, both = tmp_path_factory.mktemp("bundle"), transcoders()
    options = {"packing": PACKING, "masking": MASKING, "keep": KEEP}
    own = harvest(model(), both, from_texts(texts()[:12]), out / "store", **options)
    folders = [
        write(own, out / write.__name__, EXPORT, model(), both) for write in (pages.write_pages, pages.write_bundle)
    ]
    return own, *folders


def test_pages_are_those_of_the_activations(store, loose):
    back, code, d = pages.read_pages(loose), found(brute().codes["some"], store), dictionaries()["some"]
    logits = d.decoder[0]["resid_post.1"] @ (model().hf.lm_head.weight * model().hf.model.norm.weight).T
    assert list(back) == [(1, i) for i in range(24)]
    for i in (0, 11, 23):
        page, values = back[1, i], code[..., i][code[..., i] != 0]
        assert (page["index"], page["transcoder_id"]) == (i, "random-llama/1-some-24")
        assert page["top_logits"] == model().text.token_texts(logits[i].topk(10).indices.tolist())
        assert page["bottom_logits"] == model().text.token_texts(logits[i].topk(10, largest=False).indices.tolist())
        assert page["activation_frequency"] == pytest.approx(len(values) / store.counted)
        assert sum(page["histogram"]) == len(values)
        assert page["act_min"] == 0
        if not len(values):
            assert (page["examples_quantiles"], page["quantile_values"], page["act_max"]) == ([], [], 0)
            continue
        assert page["act_max"] == pytest.approx(float(values.max()), rel=2e-3)
        ranks = [-(-k * len(values) // 100) - 1 for k in range(1, 100)]
        assert page["quantile_values"] == pytest.approx(values.sort().values[ranks].tolist(), rel=4e-3)
        examples = [e for q in page["examples_quantiles"] for e in q["examples"]]
        assert page["examples_quantiles"][0]["quantile_name"] == "Top"
        assert len(examples) == len(store.latents("some").top(i)) + len(store.latents("some").sampled(i))
        assert examples[0]["tokens_acts_list"][examples[0]["train_token_ind"]] == pytest.approx(
            page["act_max"], rel=2e-3
        )
        own = [(*e["tokens"], e["train_token_ind"], *e["tokens_acts_list"]) for e in examples]
        repeated = [e["is_repeated_datapoint"] for e in examples]
        assert repeated == [x in own[:n] for n, x in enumerate(own)]


def test_loose_pages_and_bundles_are_the_same_and_name_every_feature(bundle):
    _, loose, packed = bundle
    back = pages.read_pages(packed)
    assert back == pages.read_pages(loose)
    assert list(back) == [(layer, i) for layer, n in ((0, 6), (1, 5)) for i in range(n)]
    assert {f.stem for f in loose.iterdir()} == {str(cantor(*place)) for place in back}
    for page in back.values():
        assert set(page) == set(pages.SCHEMA["page"])
        for quantile in page["examples_quantiles"]:
            assert set(quantile) == set(pages.SCHEMA["quantile"])
            assert all(set(e) == set(pages.SCHEMA["example"]) for e in quantile["examples"])
    index = json.loads(gzip.decompress((packed / "index.json.gz").read_bytes()))["1"]
    start, end = index["offsets"][3:5]  # as the viewer reads it
    part = (packed / index["filename"]).read_bytes()[start:end]
    assert json.loads(gzip.decompress(part[4 : 4 + int.from_bytes(part[:4], "little")])) == back[1, 3]


def example(**changes):
    return {
        "tokens": ["<b>", " c"],
        "tokens_acts_list": [0, 1.5],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
    } | changes


def page(**changes):
    quantiles = [{"quantile_name": "Top", "examples": [example()]}]
    numbers = {"act_min": 0, "act_max": 1.5, "quantile_values": [1.0], "histogram": [0, 1], "activation_frequency": 0.1}
    words = {"top_logits": ["&lt;"], "bottom_logits": ["</script>"]}
    return {"transcoder_id": "t", "index": 3, "examples_quantiles": quantiles, **words, **numbers} | changes


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in pages.SCHEMA.items() for key in keys])
def test_every_key_is_needed_of_ours_and_of_its_type_everywhere(kind, key):
    made = page()
    row = {"page": made, "quantile": made["examples_quantiles"][0]}.get(kind) or made["examples_quantiles"][0][
        "examples"
    ][0]
    value = row.pop(key)
    with pytest.raises(Refused, match=f"lacks '{key}'"):
        pages.check_page(made, "a page", own=True)
    if key in pages.OPTIONAL[kind]:
        pages.check_page(made, "a page")
    row[key] = None
    with pytest.raises(Refused, match=f"'{key}' is None"):
        pages.check_page(made, "a page")
    row |= {key: value, "more": 1}
    pages.check_page(made, "a page")
    with pytest.raises(Refused, match="has 'more'"):
        pages.check_page(made, "a page", own=True)


def test_markup_in_tokens_is_carried_as_text(tmp_path):
    content = pages._encoded(page())
    assert not set(b"<>&") & set(content)
    (tmp_path / "7.json").write_bytes(content)
    assert list(pages.read_pages(tmp_path).values()) == [page()]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokens": ["a"]}, "1 tokens, 2 activations"),
        ({"tokens": ["a", 3]}, "'tokens' holds"),
        ({"tokens_acts_list": [0, True]}, "'tokens_acts_list' holds"),
        ({"train_token_ind": 2}, "own token at 2"),
    ],
)
def test_examples_that_do_not_fit_are_refused(changes, why):
    with pytest.raises(Refused, match=why):
        pages.check_page(
            page(examples_quantiles=[{"quantile_name": "Top", "examples": [example(**changes)]}]), "a page"
        )


def test_damaged_files_are_refused(tmp_path):
    def bundled(index, content=b""):
        (tmp_path / "layer_0.bin").write_bytes(content)
        (tmp_path / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
        return pages.read_pages(tmp_path)

    packed = gzip.compress(pages._encoded(page()))
    whole = len(packed).to_bytes(4, "little") + packed
    row = {"filename": "layer_0.bin", "offsets": [0, len(whole)]}
    assert bundled([row], whole) == bundled({"0": row}, whole) == {(0, 0): page()}
    for index, content in (
        ([row], whole[:-3]),
        ([{**row, "offsets": [0, len(whole) - 1]}], whole),
        ([{**row, "offsets": [5, 0]}], whole),
        ([{**row, "filename": "../layer_0.bin"}], whole),
        ([{"filename": "layer_0.bin"}], whole),
        ({"a": row}, whole),
        ([row], (9).to_bytes(4, "little") + b"no gzip!!" + whole),
    ):
        with pytest.raises(Refused, match="cannot be read"):
            bundled(index, content)
    (tmp_path / "index.json.gz").write_bytes(b"no gzip")
    with pytest.raises(Refused, match="cannot be read"):
        pages.read_pages(tmp_path)
    (tmp_path / "index.json.gz").unlink()
    with pytest.raises(Refused, match="no pages"):
        pages.read_pages(tmp_path)


def test_what_has_no_layer_of_its_own_is_refused(store, loose, tmp_path):
    some = dictionaries()["some"]
    with pytest.raises(Refused, match="not empty"):
        pages.write_pages(store, loose, EXPORT, model(), some, dictionary="some")
    with pytest.raises(Refused, match="this one"):
        pages.write_bundle(store, tmp_path / "x", EXPORT, model(), dictionaries()["few"], dictionary="some")
    rows = torch.eye(32)[:4]
    one = autoencoder("embed", rows, rows, torch.zeros(4), torch.zeros(32), Relu())
    for wrong in (one, together([some, autoencoder("mlp_out.1", rows, rows, torch.zeros(4), torch.zeros(32), Relu())])):
        with pytest.raises(Refused, match="one block for each layer"):
            pages._layers(wrong)
