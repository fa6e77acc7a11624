"""What every method is tried on: a random Llama with a tokenizer trained here, and the bundled model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import cutaway as ca
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.transforms import autoencoder
from cutaway.models.model import Model
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task

NAMES = ("Mary", "John", "Anna", "Peter", "Tom", "Lucy", "Paul", "Emma")
PLACES = ("store", "park", "school", "river", "market", "garden")
THINGS = ("drink", "book", "ring", "letter", "cake", "key")


def corpus() -> list[str]:
    """Sentences in which every word the tests use is frequent enough to become one token."""
    lines = []
    for i in range(48):
        a, b, c = (NAMES[(i + k) % len(NAMES)] for k in (0, 3, 5))
        place, thing = PLACES[i % len(PLACES)], THINGS[i % len(THINGS)]
        lines.append(f"When {a} and {b} went to the {place}, {b} gave a {thing} to {a}.")
        lines.append(f"{a} and {b} went to the {place}, {b} gave the {thing} to {a}.")
        lines.append(f"Then {c} and {a} said that the {thing} of {c} is in the {place} near the {thing}.")
    return lines


@cache
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Byte pairs learned from `corpus`, a leading space belonging to the word, with a token at the beginning."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tok.train_from_iterator(corpus(), trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


def config(**changes: Any) -> tf.LlamaConfig:
    """A Llama of two layers with grouped heads; dropout is on where a model is left in train mode."""
    sizes = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "attention_dropout": 0.3,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return tf.LlamaConfig(**{**sizes, **changes})


def random_llama(seed: int = 0, spread: float = 3.0) -> Model:
    """A model that nobody trained; `spread` makes attention and predictions less uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = tf.LlamaForCausalLM(config()).eval()
        with torch.no_grad():
            for p in hf.parameters():
                if p.ndim > 1:
                    p.mul_(spread)
    return Model(hf, tokenizer(), "random-llama")


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def chatting() -> Model:
    """A model that nobody trained, with a chat template that writes the beginning of text itself."""
    tok = copy.deepcopy(tokenizer())
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tok.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hf = tf.LlamaForCausalLM(config(vocab_size=len(tok), max_position_embeddings=256)).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.mul_(3.0 if p.ndim > 1 else 1.0)
    return Model(hf, tok, "chatting")


@cache
def miniworld() -> Model:
    """The bundled model, loaded once."""
    return ca.load("miniworld")


def told(a: str, b: str, new: str, place: str = "store", tail: str = "") -> Pair:
    """A sentence about two people, and the same with the second mention of one exchanged."""
    clean, corrupt = (f"{a} and {b} went to the {place}, {x} gave{tail} to" for x in (b, new))
    return Pair(clean, corrupt, f" {a}", f" {b}")


def llama_task(n: int = 2) -> Task:
    """Prompts of one length."""
    names = [NAMES[i:] + NAMES[:i] for i in range(n)]
    return Task("told", tuple(told(a, b, c) for a, b, c, *_ in names), corruption="the giver becomes another")


def uneven_task() -> Task:
    """Prompts of three lengths."""
    tails = ("", " a book", " the letter of Emma")
    pairs = tuple(told(NAMES[i], NAMES[i + 1], NAMES[i + 2], tail=tail) for i, tail in enumerate(tails))
    return Task("uneven", pairs, corruption="the giver becomes another")


@cache
def word_tokenizer(size: int) -> tf.PreTrainedTokenizerFast:
    """`w1 w2 …`: a word is a token, its number its id."""
    tok = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, size)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", pad_token="<unk>")


def numbered(*ids: int) -> str:
    """The prompt of these token ids."""
    return " ".join(f"w{i}" for i in ids)


def numbered_task(uneven: bool = False) -> Task:
    """Prompts over `w…`, of one length or several; the third word is exchanged, and another in one of them."""
    rows = [[5, 6, 7, 8, 9, 10], [25, 26, 27, 28, 29, 30], [45, 46, 47, 48, 49, 50]]
    if uneven:
        rows = [row[i:] for i, row in enumerate(rows)]
    pairs = []
    for i, row in enumerate(rows):
        other = [*row[:2], row[2] + 10, *row[3:]]
        pairs.append(Pair(numbered(*row), numbered(*other), f"w{61 + i}", f"w{71 + i}"))
    return Task("numbered", tuple(pairs), corruption="the third word becomes another")


@cache
def family(name: str, dtype: torch.dtype = torch.float32) -> Model:
    """A tiny random model of a family that reads and writes `w…`."""
    from tests.models.tiny import V, build

    hf = build(name, dtype=dtype)
    hf.requires_grad_(False)
    return Model(hf, word_tokenizer(V), f"tiny-{name}")


def dictionary(width: int, site: str = "resid_post.1", n: int = 24) -> Dictionary:
    """Latents that nobody trained, about half of them active on a token."""
    g = torch.Generator().manual_seed(n)
    rows = torch.nn.functional.normalize(torch.randn(n, width, generator=g), dim=1)
    return autoencoder(site, rows, 0.5 * rows, torch.zeros(n), torch.zeros(width), Relu())
