"""The pictures of circuitsvis: every number and token is in the HTML, and nothing is asked of the network."""

from html import unescape

import numpy as np
import pytest
import torch

from cutaway import Refused
from cutaway.compat import circuitsvis as cv
from cutaway.compat.circuitsvis.render import RenderedHTML

TOKENS = ["<bos>", "The", " cat", "\n"]


def drawn(picture: RenderedHTML) -> str:
    html = str(picture)
    assert html == picture._repr_html_() == picture.__html__() == picture.show_code()
    assert html.count("<script") == 1, "its own, in a sandbox"
    assert "http:" not in html.replace("https:", "http:")
    return unescape(html)  # what the frame holds


def test_attention_has_a_panel_a_head_and_hides_what_causal_heads_cannot_see():
    values = torch.arange(32.0, requires_grad=True).reshape(2, 4, 4)
    html = drawn(cv.attention.attention_patterns(TOKENS, values))
    assert html.count("<figure") == 2
    assert "&lt;bos&gt;" in html
    whole = cv.attention.attention_heads(values, TOKENS, ["L0H1", "L5H5"], max_value=50, mask_upper_tri=False)
    assert "L5H5" in drawn(whole)
    assert (whole.shown[0].value.sum(), whole.limit) == (31 * 16, 50)
    one = cv.attention.attention_pattern(TOKENS, values[1].detach().numpy(), show_axis_labels=False)
    assert torch.equal(one.shown[0].value.nan_to_num(0), values.detach()[1:].tril())


def test_log_probabilities_are_those_of_the_tokens_that_follow():
    ids, scores = torch.tensor([[0, 3, 1]]), torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    own, most = cv.logits.token_log_probs(ids, scores.log_softmax(-1), lambda i: f"w{i}", top_k=2).shown
    assert torch.equal(own.value, torch.stack([scores.log_softmax(-1)[0, 0, 3], scores.log_softmax(-1)[0, 1, 1]]))
    assert own.labels["position"] == ["w3", "w1"]
    best = scores[0, :2].argsort(descending=True)
    assert most.labels["value"] == [[f"w{i}" for i in row[:2]] for row in best.tolist()]
    rank = int((best[0] == 3).nonzero()) + 1
    assert most.labels["position"][0] == f"w3 (rank {rank})"


def test_the_tokens_of_neurons_are_ranked():
    values = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    picture = cv.topk_tokens.topk_tokens([TOKENS], [values.numpy()], max_k=2, first_dimension_labels=["a", "b"])
    first = picture.shown[0]
    assert first.labels["order"] == ["top 1", "top 2", "bottom 2", "bottom 1"]
    for column, neuron in enumerate(map(int, first.labels["neuron"])):
        order = values[0, :, neuron].argsort(descending=True)
        assert [row[column] for row in first.labels["value"]] == [TOKENS[i] for i in order]
    assert "text 0, layer b" in drawn(picture)


def test_activations_and_tokens_keep_their_values():
    values = np.arange(24.0).reshape(4, 2, 3)
    found = cv.activations.text_neuron_activations([TOKENS, TOKENS[:2]], [values, values[:2]])
    assert [one.value.shape for one in found.shown] == [(2, 3, 4), (2, 3, 2)]
    assert found.shown[0].value[1, 2].tolist() == values[:, 1, 2].tolist()
    assert drawn(found).count("<figure") == 4
    strip = cv.activations.text_neuron_activations(TOKENS, torch.ones(4, 1, 1))
    assert 'class="cw-fig cw-strip"' in drawn(strip)
    assert 'class="cw-fig cw-strip"' in drawn(cv.tokens.colored_tokens(TOKENS, [1, -2, 3, 4], max_value=10))
    assert "kind" in drawn(cv.tokens.colored_tokens_multi(TOKENS, torch.ones(4, 2), labels=["one", "kind"]))
    assert "Hello &lt;you&gt;" in drawn(cv.examples.hello("<you>"))


def test_what_does_not_fit_is_refused():
    with pytest.raises(Refused, match="3 names of a q_pos"):
        cv.attention.attention_patterns(TOKENS[:3], torch.ones(2, 4, 4))
    with pytest.raises(Refused, match="other axes"):
        cv.tokens.colored_tokens(TOKENS, torch.ones(1, 4))
