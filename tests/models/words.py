"""Two small tokenizers trained here: GPT-2's shape (bytes, glued spaces) and Llama's (▁ for spaces, BOS, bytes)."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "Mary John Paris the cat sat on a mat and gave it to her when they went home again in spring"
WORDS = TEXT.split(" ")
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) + "." for i in range(len(WORDS))] * 8


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's shape: no BOS, no padding token, a leading space belongs to the word."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder, tok.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Llama's shape: BOS in front, ▁ for spaces and one put before the text, bytes for what is unknown."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tok.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=460, special_tokens=specials, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def word_level() -> PreTrainedTokenizerFast:
    """Whole words, and one token for everything else."""
    tok = Tokenizer(
        models.WordLevel({"<unk>": 0, "<pad>": 1, **{w: i for i, w in enumerate(WORDS, 2)}}, unk_token="<unk>")
    )
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", pad_token="<pad>")


SHAPES = {"byte level": byte_level, "metaspace": metaspace}
