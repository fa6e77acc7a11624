"""Tokens: padding, positions, offsets into the user's text, and words as single tokens."""

import copy

import pytest
import torch
from tokenizers import processors

from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.models.tokens import batch, running_texts, tokenize
from tests.models.common import gap, model
from tests.models.tiny import build
from tests.models.words import SHAPES, byte_level, metaspace, word_level

TEXTS = ["Mary gave the mat to", "the cat"]


def with_words(tokenizer):
    """A tiny model around a tokenizer; its vocabulary is large enough."""
    hf = build("gpt2")
    hf.resize_token_embeddings(512, mean_resizing=False)
    return Model(hf, tokenizer, "worded")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_holds_each_prompt_whole(shape, side):
    t = tokenize(SHAPES[shape](), TEXTS, side)
    assert t.side == side
    assert t.padded
    for i, text in enumerate(TEXTS):
        own = SHAPES[shape]()(text)["input_ids"]
        assert t.ids[i][t.mask[i]].tolist() == own
        assert t.row(i).ids.tolist() == [own]
        assert t.position_ids[i][t.mask[i]].tolist() == list(range(len(own)))
        assert t.ids[i, t.last[i]] == own[-1]
        assert t.ids[i, t.column(0)[i]] == own[0]
        assert t.ids[i, t.column(-2)[i]] == own[-2]
    assert t.column(-1) is t.last, "computed once"
    assert t.rows([1]).last.tolist() != t.rows([0]).last.tolist() or side == "left", "for these prompts alone"
    assert t.lengths.tolist() == [int(m.sum()) for m in t.mask]
    assert t.mask[1].tolist() == sorted(t.mask[1].tolist(), reverse=side == "right")


@pytest.mark.parametrize("shape", SHAPES)
def test_offsets_and_pieces_are_the_users_text(shape):
    t = tokenize(SHAPES[shape](), TEXTS)
    for i, text in enumerate(TEXTS):
        found = [(o, p) for o, p in zip(t.offsets[i], t.pieces[i], strict=True) if o is not None]
        assert all(text[o[0] : o[1]] == p for o, p in found if o[1] > o[0])
        assert len(t.pieces[i]) == int(t.lengths[i])
        assert "".join(p for _, p in found).replace(" ", "") == text.replace(" ", "")
    assert (t.offsets[0][0] is None) == (shape == "metaspace")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("text", "word"), [("Mary", "Mary"), ("gave the", "gave"), ("mat", "mat"), ("CAT", "cat")])
def test_find_gives_the_positions_of_a_phrase(shape, text, word):
    t = tokenize(SHAPES[shape](), TEXTS)
    row = 1 if text == "CAT" else 0
    pieces = [t.pieces[row][n] for n in t.find(row, text)]
    assert word in "".join(pieces)
    assert len("".join(pieces).strip()) <= len(text) + 1


def test_what_is_not_in_the_prompt_is_refused():
    t = tokenize(byte_level(), TEXTS)
    for wrong in ("dog", ""):
        with pytest.raises(Refused, match="not in the prompt"):
            t.find(0, wrong)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("before", ["İİİİİİİİ", "ﬁne ẞ", "𝕀𝕤𝕥", "e\u0301e\u0301"])
def test_a_phrase_is_found_behind_letters_of_another_length(shape, before):
    t = tokenize(SHAPES[shape](), f"{before} gave Mary the mat")
    assert "".join(t.pieces[0][n] for n in t.find(0, "mary")).strip() == "Mary"


def test_a_tokenizer_that_tells_no_places_is_asked_by_its_texts():
    class Slow:
        is_fast, all_special_ids, unk_token_id = False, [0], None
        words = ("<s>", "the", " cat", " sat")

        def __call__(self, text, **_):
            return {"input_ids": [0, *(self.words.index(w) for w in ("the", " cat", " sat"))]}

        def decode(self, ids, **_):
            return "".join(self.words[i] for i in ids)

    assert tokenize(Slow(), "the cat sat").offsets == ((None, (0, 3), (3, 7), (7, 11)),)
    assert tokenize(Slow(), "the cat sat").find(0, "CAT") == [2]
    with pytest.raises(Refused, match="does not say where"):
        tokenize(Slow(), "The cat sat").find(0, "cat")


def test_labels_tell_repeated_pieces_apart():
    assert tokenize(byte_level(), "the cat the").labels() == ["t·0", "he·1", "cat", "the"] or tokenize(
        byte_level(), " the cat the"
    ).labels() == ["the·0", "cat", "the·2"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("word", ["Mary", "cat", "Paris"])
def test_one_token_words_are_the_token_they_become_in_a_text(shape, word):
    m = with_words(SHAPES[shape]())
    one = m.text.token_id(word)
    assert one == m.text.token_id(" " + word)
    assert tokenize(SHAPES[shape](), f"the {word}").ids[0, -1] == one
    assert m.text.token_texts([one])[0].strip() == word
    assert m.text.word_ids(word) == [one]


@pytest.mark.parametrize("shape", SHAPES)
def test_words_of_several_tokens_are_refused_with_their_parts(shape):
    m = with_words(SHAPES[shape]())
    with pytest.raises(Refused, match=r"tokens here: .*\+"):
        m.text.token_id("zebrafish")
    assert len(m.text.word_ids("zebrafish")) > 1
    for nothing in ("", " \n"):
        with pytest.raises(Refused, match="nothing in it"):
            m.text.token_id(nothing)
    with pytest.raises(Refused, match="half of"):
        m.text.token_id("\ud83d")
    with pytest.raises(Refused, match="without a tokenizer"):
        model("llama").text.token_id("Mary")
    assert model("llama").text.token_texts(torch.tensor([4, 5])) == ["4", "5"]


def test_predictions_are_the_likeliest_next_tokens_of_one_prompt():
    m = with_words(byte_level())
    probabilities = m.run_last("the cat")[0].softmax(-1)
    found = m.text.predict("the cat", 3)
    assert [p.id for p in found] == probabilities.topk(3).indices.tolist()
    assert [p.text for p in found] == m.text.token_texts([p.id for p in found])
    assert [p.probability for p in found] == pytest.approx(probabilities.topk(3).values.tolist())
    with pytest.raises(Refused, match="of one prompt"):
        m.text.predict(m.tokens(["the cat", "the mat"]))
    with pytest.raises(Refused, match="vocabulary has 512"):
        m.text.predict("the cat", 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_text_runs_the_same_alone_and_padded(shape):
    m = with_words(SHAPES[shape]())
    alone = torch.cat([m.run_last(text) for text in TEXTS])
    for side in ("left", "right"):
        assert gap(m.run_last(m.tokens(TEXTS, side)), alone) < 1e-5
    assert torch.equal(m.run(TEXTS[0]), m.run(m.tokens(TEXTS[0]).ids))
    assert len(m.generate(TEXTS, 3)) == 2


@pytest.mark.parametrize(
    ("prompts", "word"),
    [
        ([], "nothing to run"),
        ("", "empty"),
        (["the cat", "  \n"], "empty"),
        (["the cat", "cut \ud83d"], "half of a character"),
        ("the cat " * 40, "takes 64"),
        (torch.tensor([[5, 600]]), "from 0 to 511"),
        (torch.tensor([[-1, 5]]), "from 0 to 511"),
        (torch.ones(1, 65, dtype=torch.long), "takes 64"),
    ],
)
def test_prompts_that_cannot_run_are_refused(prompts, word):
    with pytest.raises(Refused, match=word):
        with_words(metaspace()).run(prompts)


def ending(tokenizer, single, name):
    """A tokenizer that puts special tokens around texts as `single` says."""
    new = copy.deepcopy(tokenizer)
    new._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, new.convert_tokens_to_ids(name))]
    )
    return new


def test_a_prompt_has_one_beginning():
    tokenizer = metaspace()
    plain, t = tokenize(tokenizer, "Mary gave"), tokenize(tokenizer, ["<s>Mary gave", "Mary gave"])
    assert torch.equal(t.ids, plain.ids.expand(2, -1))
    assert t.offsets[0][0] is None
    assert t.pieces[0] == plain.pieces[0]
    assert tokenize(tokenizer, "Mary gave", bos=False).ids.tolist() == [plain.ids[0, 1:].tolist()]
    assert torch.equal(tokenize(tokenizer, "Mary gave", bos=True).ids, plain.ids)
    for bos, text in ((None, "<s><s>Mary"), (False, "<s>Mary")):
        with pytest.raises(Refused, match=r"it begins with . × '<s>'"):
            tokenize(tokenizer, text, bos=bos)
    with pytest.warns(UserWarning, match="holds 2 × '<s>'"):
        tokenize(tokenizer, "Mary<s>gave")


def test_a_beginning_is_put_where_the_tokenizer_puts_none():
    tokenizer = copy.deepcopy(byte_level())
    m = with_words(tokenizer)
    with pytest.raises(Refused, match="has no beginning-of-text token"):
        m.tokens("the cat", bos=True)
    tokenizer.bos_token = "<|end|>"
    bos, ids = tokenizer.bos_token_id, m.tokens("the cat").ids[0].tolist()
    assert (
        m.tokens("the cat", bos=True).ids.tolist() == m.tokens("<|end|>the cat", bos=True).ids.tolist() == [[bos, *ids]]
    )
    acts, alone = m.capture("the cat", "resid_post.1", bos=True), m.capture(torch.tensor([[bos, *ids]]), "resid_post.1")
    assert torch.equal(acts["resid_post.1"], alone["resid_post.1"])
    with pytest.raises(Refused, match="ids are taken as they are"):
        m.tokens(torch.tensor([[5]]), bos=True)
    with pytest.raises(Refused, match="framed in one way"):
        tokenize(tokenizer, "the cat", bos=False, causal=False)


def test_prompts_are_read_before_what_the_tokenizer_appends():
    tokenizer = ending(byte_level(), "$A <|end|>", "<|end|>")
    with counting() as spent, pytest.warns(UserWarning, match="prompts are read before it"):
        t = tokenize(tokenizer, TEXTS)
    plain = tokenize(byte_level(), TEXTS)
    assert torch.equal(t.ids, plain.ids)
    assert spent.events == ["the tokenizer puts '<|end|>' behind every text; prompts are read before it"]
    assert tokenize(tokenizer, "the cat", causal=False).ids[0, -1] == tokenizer.eos_token_id
    with pytest.warns(UserWarning, match="behind"):
        assert tokenize(tokenizer, "the cat<|end|>").ids[0, -1] == tokenizer.eos_token_id


def test_unknown_words_are_refused_not_dropped():
    assert tokenize(word_level(), "the cat").ids.shape == (1, 2)
    with pytest.raises(Refused, match="no token for part"):
        tokenize(word_level(), "the zebra")


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(Refused, match="without a tokenizer"):
        model("llama").run("the cat")


def test_positions_outside_a_prompt_are_refused():
    t = batch([[1, 2, 3], [4]])
    assert t.column(-1).tolist() == [2, 0]
    for position in (1, -2):
        with pytest.raises(Refused, match="shortest prompt has 1 token"):
            t.column(position)


def test_imports_keep_the_padding():
    t = batch([[1, 2, 3], [4], [5, 6]], side="left")
    assert t.rows([1, 2, 1]).ids.tolist() == [[0, 0, 4], [0, 5, 6], [0, 0, 4]]
    assert t.rows(slice(0, 2)).mask.tolist() == [[True] * 3, [False, False, True]]
    assert t.to("cpu").ids is t.ids


@pytest.mark.parametrize("shape", SHAPES)
def test_running_texts_are_the_text(shape):
    tokenizer = SHAPES[shape]()
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    texts = running_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts).strip() == TEXTS[0]
    assert all(t.startswith(" ") for t in texts[1:] if t.strip() in ("gave", "the", "mat", "to"))


def test_running_texts_of_characters_in_pieces_and_of_rewritten_text():
    tokenizer = byte_level()
    ids = tokenizer("a é", add_special_tokens=False)["input_ids"]
    assert "".join(running_texts(tokenizer, ids)) == "a é"

    class Rewriting:
        def decode(self, ids, **_):
            return "?" * len(ids) if len(ids) < 2 else "x" * len(ids)

    assert running_texts(Rewriting(), [1, 2, 3]) == ["?", "?", "?"]


def test_prompts_by_length():
    tokens = batch([[1, 2], [1], [3, 4], [1, 2, 3]])
    assert list(tokens.by_length().items()) == [((1,), [1]), ((2,), [0, 2]), ((3,), [3])]
