"""Models by name: of the zoo, from a folder, from the Hugging Face hub; and the subjects `model` and `other`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutaway.core.subject import Flag, Subject, register
from cutaway.models.loading.load import load as load_model
from cutaway.models.loading.provenance import loaded
from cutaway.models.loading.shuffle import SHUFFLED, shuffled
from cutaway.models.model import Model
from cutaway.zoo import DEFAULT_MODEL, find


def load(x: str | Path | Any, **options: Any) -> Model:
    """Load the model meant by `x`: a zoo name, a local folder, a GGUF file, a Hugging Face id, or a live
    `PreTrainedModel`.

    A model of the zoo carries the truth about its world as `model.world`, or the program that it is as `model.program`.

    Raises:
        Refused: no such model, a broken folder, or an architecture that cannot be read.
    """
    entry = find(x) if isinstance(x, str) else None
    if entry is None:
        return load_model(x, **options)
    source, left = entry.source(options)
    model = load_model(source, **{"name": entry.name, "world": entry.world(), **left})
    model.program = entry.program()
    model.made = loaded(model, str(x), options)
    return model


def from_flags(source: str, dtype: str | None = None, device: str | None = None, attention: str | None = None) -> Model:
    """Load the model that flags of a command line mean, without bars of progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    given = {"dtype": dtype, "device": device, "attention": attention}
    return load(source, **{k: v for k, v in given.items() if v is not None})


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Model:
    return from_flags(*flags.values())


def _open_other(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Model:
    model: Model = opened["model"]
    if flags["other"] == SHUFFLED:
        return shuffled(model)
    dtype = flags["other_dtype"] or str(model.dtype).removeprefix("torch.")
    device = flags["other_device"] or (None if str(model.device) == "cpu" else str(model.device))
    return from_flags(flags["other"], dtype, device, flags["other_attention"])


_DEVICE = "device, such as cuda:0; auto spreads over all, tensor_parallel over torchrun's"
MODEL = register(
    Subject(
        "model",
        Model,
        (
            Flag("model", str, DEFAULT_MODEL, "zoo name, folder, GGUF file, or Hugging Face id (org/name@revision)"),
            Flag("model_dtype", str | None, None, "dtype of the weights, such as bfloat16"),
            Flag("model_device", str | None, None, _DEVICE),
            Flag(
                "model_attention", str | None, None, "implementation of attention, such as eager [default: the model's]"
            ),
        ),
        _open,
        lambda opened: load(DEFAULT_MODEL),
    )
)
OTHER = register(
    Subject(
        "other",
        Model,
        (
            Flag(
                "other",
                str,
                SHUFFLED,
                f"another checkpoint: zoo name, folder, GGUF file, Hugging Face id, or {SHUFFLED}",
            ),
            Flag("other_dtype", str | None, None, "dtype of its weights [default: the model's]"),
            Flag("other_device", str | None, None, "its device [default: the model's]"),
            Flag("other_attention", str | None, None, "its implementation of attention"),
        ),
        _open_other,
        lambda opened: shuffled(opened["model"]),
    )
)
