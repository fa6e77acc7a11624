"""Two tokenizer shapes trained here (byte-level with glued spaces; sentencepiece-like with BOS and single digits)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import cutaway as ca
from cutaway.models.model import Model
from cutaway.tasks.words import kinds, table

FRAMES = (
    "Then, X and X went to the X. When After While They met at the gave a handed decided to give the to. "
    "The X lasted from the year 17 to the year 1742. def self param : load (self, X, X, X): "
    "We know that the near by He said is are 1 < 2. The capital of X is in, the city called language Most people "
    "speak. We list them in order: X, X, X, We saw the X. Review: was and the end Sentiment: positive negative verdict "
    "I think this music. User: How do I my? Assistant: Sorry Sure Tell me how a. The secret word repeat after me"
)


def corpus() -> list[str]:
    words = sorted({w for kind in kinds() for w in kind} | {w for (w,) in table("arguments").rows})
    lines = [FRAMES.replace("X", w) for w in words]
    years = [f"from the year {c}{y:02d} to {c}{y:02d}" for c in range(11, 20) for y in range(100)]
    return [*lines, *(f"the {w}, {w}: {w}" for w in words for _ in range(3)), *years,
            *(f"We know that {n} + {n} = {n}" for n in range(100))]  # fmt: skip


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's shape: a leading space belongs to the word; no BOS; years in two halves."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern=Regex(r"(?<= [0-9]{2})[0-9]{2}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tok.decoder, tok.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tok.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Llama's shape: ▁ for spaces, one put before the text, every digit a token, bytes as fallback, BOS in front."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(pattern=Regex(r"▁?[^▁\s\w]|▁?\w+|▁+|\s+"), behavior="isolated"),
    ])  # fmt: skip
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=specials, show_progress=False)
    tok.train_from_iterator(corpus(), trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SHAPES = {"gpt2": byte_level, "llama": metaspace}


def tiny(tokenizer: PreTrainedTokenizerFast, name: str, world=None) -> Model:
    """A random one-layer model around a tokenizer, with logits far enough apart to have a clear top prediction."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=192, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return Model(hf, tokenizer, name, world)


@pytest.fixture(params=sorted(SHAPES), scope="session")
def model(request):
    """A model of each tokenizer shape."""
    return tiny(SHAPES[request.param](), f"tiny-{request.param}")


@pytest.fixture(scope="session")
def gpt2():
    """A model with the byte-level tokenizer."""
    return tiny(byte_level(), "gpt2")


@pytest.fixture(scope="session")
def llama():
    """A model with the sentencepiece-like tokenizer."""
    return tiny(metaspace(), "tiny-llama")


@pytest.fixture(scope="session")
def worldly():
    """The bundled model, which knows the truth of its own world."""
    return ca.load("miniworld")
