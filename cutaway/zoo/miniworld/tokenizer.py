"""The tokenizer of the miniworld: byte-level BPE over lower-cased text that takes any text and loses none of it.

Rules, in the order in which they apply:

1. Lower case (offsets still point into the caller's text).
2. One space is put before the text unless it begins with white space; so `"Mary"` and `" Mary"` are the same token.
   Decoding gives the text back up to case and that one space.
3. Cut into words (`Ġword`), single punctuation marks, and numbers: a four-digit number is a year and is two tokens of
   two digits (`Ġ17 42`); two digits right after the word *year* are the century of an unfinished year (`year 17`);
   every other number goes digit by digit (`Ġ6 8`).
4. A known word is exactly one token. A person's name is exactly three (`Ġka ro vi`): consonant-vowel merges, and
   nothing else merges. Any other text falls back to those syllables and to single bytes.

A `<bos>` is put before every text. `<bos>` also ends a text, so it is the end-of-sequence token too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cutaway.zoo.miniworld.words import CENTURIES, SYLLABLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS = "<pad>", "<bos>"
PAD_ID, BOS_ID = 0, 1
SPACE = "Ġ"  # how byte-level tokenizers write a space

# The patterns see byte symbols, not characters: a space is Ġ, a newline Ċ.
_PIECE = "|".join(
    (
        rf"(?<={SPACE}year){SPACE}[0-9]{{2}}(?![0-9])",  # the century of an unfinished year
        rf"(?<![0-9]){SPACE}?[0-9]{{4}}(?![0-9])",  # a year, cut in two by _YEAR
        rf"{SPACE}?[0-9]",
        rf"{SPACE}?[a-z]+",
        rf'{SPACE}?"""',
        rf"{SPACE}?->",
        rf"{SPACE}+(?={SPACE})",
        rf"{SPACE}?[^a-z0-9{SPACE}]",
        SPACE,
    )
)
_YEAR = rf"^{SPACE}?[0-9]{{2}}(?=[0-9]{{2}}$)"
_MARKS = (*".,:;?!()[]{}'\"+-=*/<>_#", "->", '"""')


def byte_symbols() -> list[str]:
    """Return the 256 printable symbols that stand for the bytes 0 to 255, in byte order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(extra)) for b in range(256)]


def vocabulary(words: Iterable[str]) -> list[str]:
    """Return all tokens in the order of their ids: special, bytes, syllables, numbers, marks, known words."""
    digits = [str(d) for d in range(10)]
    tokens = [PAD, BOS, *byte_symbols()]
    tokens += [*SYLLABLES, *(SPACE + s for s in SYLLABLES)]
    tokens += [SPACE + d for d in digits] + [f"{n:02d}" for n in range(100)] + [SPACE + c for c in CENTURIES]
    tokens += [mark for mark in _MARKS if len(mark) > 1] + [SPACE + mark for mark in _MARKS]
    tokens += [SPACE * 2, SPACE * 3, "self", "param"]
    tokens += [SPACE + w for w in sorted(set(words)) if SPACE + w not in tokens]
    return list(dict.fromkeys(tokens))


def build(words: Iterable[str]) -> Tokenizer:
    """Return the tokenizer whose known words are `words` (lower case, letters only)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {token: i for i, token in enumerate(vocabulary(words))}
    merges = [(s[0], s[1]) for s in SYLLABLES] + [(SPACE, s) for s in SYLLABLES]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.Split(Regex(_YEAR), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads as they are."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
