"""The helpers of `utils`, heads, singular vectors and evaluations, against TransformerLens 3.9's values and by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from bench.compat import helpers
from cutaway.compat.transformer_lens import utils
from cutaway.compat.transformer_lens.evals import evaluate, evaluate_on_dataset
from cutaway.compat.transformer_lens.head_detector import detect_head
from cutaway.compat.transformer_lens.svd_interpreter import SVDInterpreter
from cutaway.compat.transformer_lens.utils import Mismatch
from cutaway.core.refuse import Refused
from tests.compat.helpers import REFERENCE, model


def test_numbers_equal_transformer_lens():
    found = helpers.numbers(utils)
    assert set(found) == set(REFERENCE["numbers"])
    for name, x in found.items():
        np.testing.assert_allclose(x.tolist(), REFERENCE["numbers"][name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_names_equal_transformer_lens():
    assert [utils.get_act_name(*given) for given in helpers.NAMES] == REFERENCE["names"]


def test_arrays_slices_and_corners():
    assert utils.to_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).dtype == np.float32
    assert [utils.to_numpy(x).tolist() for x in ([1, 2], (3,), 4.5, "a")] == [[1, 2], [3], 4.5, "a"]
    assert utils.Slice.unwrap(3).apply(torch.arange(5)).tolist() == [3]
    assert utils.Slice((1, 5, 2)).indices(9).tolist() == [1, 3]
    assert (utils.Slice(-1).indices().tolist(), repr(utils.Slice(None))) == ([-1], repr(utils.Slice()))
    assert utils.get_corner(torch.eye(5)).shape == (3, 3)
    assert utils.remove_batch_dim(torch.ones(1, 2)).shape == (2,)
    for wrong in (lambda: utils.to_numpy({}), lambda: utils.Slice("x"), lambda: utils.Slice((1, 2)).indices()):
        with pytest.raises(Mismatch):
            wrong()


def test_shapes_and_fans():
    assert [utils.is_lower_triangular(x) for x in (torch.eye(3), torch.ones(3, 3), torch.ones(2, 3))] == [
        True,
        False,
        False,
    ]
    assert [utils.is_square(x) for x in (torch.eye(3), torch.ones(2, 3), torch.ones(3))] == [True, False, False]
    assert utils.transpose(torch.ones(4, 2, 3)).shape == (4, 3, 2)
    assert (utils.override_or_use_default_value(True, False), utils.override_or_use_default_value(3)) == (False, 3)
    shapes = {(): None, (5,): (1, 5), (2, 3): (2, 3), (4, 2, 3): (2, 12)}
    for shape, fans in shapes.items():
        if fans:
            assert utils.calc_fan_in_and_fan_out(torch.ones(shape)) == fans
        else:
            with pytest.raises(Mismatch):
                utils.calc_fan_in_and_fan_out(torch.ones(shape))
    xavier, kaiming = (2 / 300) ** 0.5, 0.1 * 2**0.5
    for init, std in ((utils.init_xavier_uniform_, xavier), (utils.init_xavier_normal_, xavier),
                      (utils.init_kaiming_uniform_, kaiming), (utils.init_kaiming_normal_, kaiming)):  # fmt: skip
        torch.manual_seed(0)
        drawn = init(torch.empty(100, 200), gain=2.0)
        assert float(drawn.std()) == pytest.approx(2 * std, rel=0.02)
        assert (drawn.abs().max() < 2 * std * 3**0.5 + 1e-6) == ("uniform" in init.__name__)


def test_nothing_is_downloaded():
    for call in (lambda: utils.download_file_from_hf("a/b", "c.pth"), lambda: evaluate(None)):
        with pytest.raises(Refused, match="download"):
            call()


class Words:
    """A tokenizer of numbers as words, and the model's own ways with text."""

    pad_token, eos_token_id, bos_token_id = None, 0, 0

    def __call__(self, texts, **how: Any):
        return {"input_ids": [[int(w) for w in text.split()] for text in texts]}

    def add_special_tokens(self, tokens):
        self.pad_token = tokens["pad_token"]


class Texts:
    """A data set as far as it is used: columns, and a map over the share of each process, as `datasets` has it."""

    def __init__(self, **columns):
        self.features = columns

    def remove_columns(self, names):
        return Texts(**{n: rows for n, rows in self.features.items() if n not in names})

    def map(self, function, batched, remove_columns, num_proc=None):
        assert batched
        assert remove_columns == ["text"] == list(self.features)
        rows = self.features["text"]
        size = -(-len(rows) // max(min(num_proc or 1, len(rows)), 1)) or 1
        shares = [rows[at : at + size] for at in range(0, len(rows), size)] or [[]]
        return Texts(tokens=[row for share in shares for row in function({"text": share})["tokens"]])

    def set_format(self, type, columns):
        assert (type, columns) == ("torch", ["tokens"])


def test_texts_become_rows_with_ends_between_and_a_beginning_before():
    def rows(*texts, **options):
        found = Texts(text=list(texts), other=[None] * len(texts))
        return utils.tokenize_and_concatenate(found, Words(), **options).features["tokens"]

    texts = "1 2 3", "4", "5 6 7"
    assert rows(*texts, max_length=4, num_proc=None) == [[0, 1, 2, 3], [0, 0, 4, 0], [0, 5, 6, 7]]
    assert rows(*texts, max_length=12, add_bos_token=False, streaming=True) == [[1, 2, 3, 0, 4, 0, 5, 6, 7, 0, 0, 0]]
    # Two processes share the texts: the rest of each share is dropped.
    assert rows(*texts, max_length=4, num_proc=2) == [[0, 1, 2, 3], [0, 5, 6, 7]]
    assert rows() == []


class Spoken:
    """A model with words for tokens."""

    def __init__(self, name: str):
        self.inner = model(name)
        self.cfg, self.run_with_cache = self.inner.cfg, self.inner.run_with_cache

    def __call__(self, tokens, **how: Any):
        return self.inner(tokens, **how)

    def to_tokens(self, text, prepend_bos=True):
        rows = [[int(w) for w in t.split()] for t in ([text] if isinstance(text, str) else text)]
        return torch.tensor([[0] * (prepend_bos is not False) + row for row in rows])

    def to_str_tokens(self, text, prepend_bos=True):
        return [f" {i}" for i in self.to_tokens(text, prepend_bos)[0].tolist()]

    def to_string(self, token):
        return f" {int(token)}"


def test_a_prompt_is_tested_for_its_answer(capsys):
    spoken = Spoken("gpt2")
    logits = spoken(spoken.to_tokens("5 9 31"))[0, -1]
    order = logits.argsort(descending=True).tolist()
    utils.test_prompt("5 9 31", str(order[2]), spoken, top_k=2)
    said = capsys.readouterr().out
    assert "Tokenized prompt: [' 0', ' 5', ' 9', ' 31']" in said
    p = logits.softmax(0)[order[2]].item()
    assert f"Rank: 2        Logit: {logits[order[2]].item():5.2f} Prob: {p:6.2%} Token: | {order[2]}|" in said
    assert f"Top 1th token. Logit: {logits[order[1]].item():5.2f}" in said
    assert f"Ranks of the answer tokens: [(' {order[2]}', 2)]" in said
    utils.test_prompt("5 9 31", [str(order[0]), str(order[1])], spoken, print_details=False)
    assert capsys.readouterr().out == f"Ranks of the answer tokens: [[(' {order[0]}', 0), (' {order[1]}', 1)]]\n"


def test_heads_are_scored_by_their_patterns():
    spoken = Spoken("gpt2")
    text, n = "5 9 5 9", 5
    _, cache = spoken.run_with_cache(spoken.to_tokens(text), remove_batch_dim=True)
    pattern = cache["pattern", 1][2]
    previous = pattern.diagonal(-1).sum() / pattern.sum()
    found = detect_head(spoken, text, "previous_token_head", cache=cache)
    assert found[1, 2] == pytest.approx(float(previous), abs=1e-5)
    some = detect_head(spoken, text, "induction_head", [(1, 2)], exclude_bos=True, exclude_current_token=True)
    assert some.ne(-1).sum() == 1
    off = pattern.clone().fill_diagonal_(0)
    off[:, 0] = 0
    assert some[1, 2] == pytest.approx(float((off[3, 2] + off[4, 3]) / off.sum()), abs=1e-5)
    absolute = detect_head(spoken, text, torch.eye(n), {1: [2]}, error_measure="abs")
    assert absolute[1, 2] == pytest.approx(1 - float((pattern - torch.eye(n)).abs().mean() * n), abs=1e-3)
    both = detect_head(spoken, [text, "5 5 5 5"], "duplicate_token_head")
    each = [detect_head(spoken, t, "duplicate_token_head") for t in (text, "5 5 5 5")]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    for wrong in ({"detection_pattern": "no head"}, {"detection_pattern": torch.ones(n, n)},
                  {"detection_pattern": torch.eye(n), "error_measure": "square"}):  # fmt: skip
        with pytest.raises(Mismatch):
            detect_head(spoken, text, **wrong)


def test_singular_vectors_are_read_through_the_unembedding():
    m = model("gpt2")
    reader = SVDInterpreter(m)
    found = reader.get_singular_vectors("OV", 1, 3, head_index=2)
    assert found.shape == (32, 1, 3)
    v = torch.linalg.svd(m.W_V[1, 2] @ m.W_O[1, 2]).Vh[0]
    torch.testing.assert_close(found[:, 0, 0].abs(), (v @ m.W_U).abs(), atol=1e-4, rtol=1e-4)
    for kind, matrix in (("w_in", m.W_in[0].T), ("w_out", m.W_out[0])):
        v = torch.linalg.svd(matrix).Vh[1]
        torch.testing.assert_close(
            reader.get_singular_vectors(kind, 0)[:, 0, 1].abs(), (v @ m.W_U).abs(), atol=1e-4, rtol=1e-4
        )
    for kind in ("OV", "W_K"):
        with pytest.raises(Mismatch):
            reader.get_singular_vectors(kind, 0)


def test_losses_are_averaged_over_batches():
    m = model("gpt2")
    batches = [{"tokens": helpers.CLEAN}, {"tokens": helpers.CORRUPT}]
    losses = [m(b["tokens"], return_type="loss").item() for b in batches]
    assert evaluate_on_dataset(m, batches, device="cpu") == pytest.approx(sum(losses) / 2)
