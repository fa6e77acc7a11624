"""Models made for the tests of estimates: GPT-2s whose nonlinear parts are taken out one by one."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import nn

from cutaway.models.model import Model
from cutaway.tasks.task import Task
from tests.conformance import subjects


def straight(layers: int = 2, attention: float = 0.0) -> Model:
    """A GPT-2 without norms and activation functions; `attention` scales its queries, and 0 makes patterns constant."""
    tok = subjects.tokenizer()
    config = tf.GPT2Config(
        vocab_size=len(tok), n_embd=32, n_layer=layers, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf: Any = tf.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1))
    hf.transformer.ln_f = nn.Identity()
    for block in hf.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        block.attn.c_attn.weight.data[:, :32] *= attention
        block.attn.c_attn.bias.data[:32] *= attention
    return Model(hf, tok, "straight")


def alike(model: Model, task: Task, step: float = 2e-3) -> Model:
    """The model with almost the same embedding for all words in which clean and corrupt prompts differ."""
    bound, table = task.bind(model), model.hf.get_input_embeddings().weight
    words = torch.cat([t.ids[bound.changed] for t in (bound.clean, bound.corrupt)]).unique()
    with torch.no_grad():
        mean = table[words].mean(0)
        table[words] = mean + step * (table[words] - mean)
    return model
