"""What heads look at in long texts: the first 2,048 tokens of modules of PyTorch, whose version is pinned, streamed."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
from torch.nn.modules import rnn, transformer
from torch.optim import lr_scheduler

import cutaway as ca
from cutaway.heads import StreamedAttention, stream
from tests.real.written import measure

LONG = "attention over long texts"
TEXTS: tuple[ModuleType, ...] = (rnn, transformer, lr_scheduler)
TOKENS, ROWS, FAR = 2048, 128, 512


def texts(model: ca.Model) -> ca.tasks.Prompts:
    """The beginning of each module, as token ids."""
    return ca.tasks.as_prompts(
        [model.tokens(inspect.getsource(m)[: 8 * TOKENS]).ids[0, :TOKENS].tolist() for m in TEXTS]
    )


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_what_heads_look_at_over_thousands_of_tokens(model, results):
    got = stream(model, texts(model), mode="sampled", rows=ROWS, samples=8)
    assert got.record["queries"] == [ROWS] * len(TEXTS)
    assert got.position.shape == (len(TEXTS), ROWS)
    write_types(results, got)
    far = [i for i, name in enumerate(got.labels["bucket"]) if int(name.split("–")[0]) >= FAR]
    away = got.distance[..., far].sum(-1)
    results.row(LONG, f"attention at {FAR} tokens and more, mean of all heads", len(TEXTS),
                effect={"value": float(away.mean()), "control": [float(got.uniform[far].sum())] * 2})  # fmt: skip
    for i in away.flatten().argsort(descending=True)[:3].tolist():
        at = (i // away.shape[1], i % away.shape[1])
        first = float(got.mass[got.labels["type"].index("first token")][at])
        assert first > 0.8, "what lies farthest back is the first token"
        results.row(LONG, f"{at[0]}.{at[1]}, attention at {FAR} tokens and more", len(TEXTS),
                    effect={"value": float(away[at])}, first={"value": first})  # fmt: skip


def write_types(results, got: StreamedAttention) -> None:
    """The heads that look most at each type of keys, with intervals over texts and the shuffled keys."""
    for k, name in enumerate(got.labels["type"]):
        mass = got.mass[k]
        best = int(mass.flatten().argmax())
        assert float(got.interval[k].flatten(0, 1)[best, 0]) > float(got.null[k].flatten(0, 1)[best].max()), name
        for i in mass.flatten().argsort(descending=True)[:3].tolist():
            at = (i // mass.shape[1], i % mass.shape[1])
            results.row(LONG, f"{name}: {at[0]}.{at[1]}", len(TEXTS),
                        effect=measure(mass[at], got.interval[k][at], got.null[k][at]))  # fmt: skip


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_streamed_numbers_are_those_of_the_model_s_own_pattern(model, name):
    prompt = ca.tasks.as_prompts([texts(model).bind(model).ids[0, :512].tolist()])
    ids = prompt.bind(model).ids
    got = stream(model, prompt, mode="exact", layers=(3, 23), top=4, samples=1)
    pattern = torch.stack([model.capture(ids, f"pattern.{i}", logits=False)[f"pattern.{i}"][0] for i in (3, 23)])
    rows = pattern[:, :, 1:]
    torch.testing.assert_close(got.mass[2], rows[..., 0].mean(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.weight[:, :, 0], rows.topk(4, -1).values, rtol=1e-3, atol=1e-6)
    entropy = -(rows * rows.clamp_min(1e-30).log()).sum(-1).mean(-1)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-4, atol=1e-5)
    same = (ids[0][:, None] == ids[0]).tril(-1)[1:]
    found = (rows * same).sum(-1)[..., same.any(-1)].mean(-1)
    torch.testing.assert_close(got.mass[3], found, rtol=1e-4, atol=1e-6)
