"""Files of native models: repositories or folders with TransformerLens' own configuration, weights and checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.compat import MODELS
from cutaway.compat.aliases import NAMES
from cutaway.compat.transformer_lens.config import HookedTransformerConfig as Config
from cutaway.core.pt import read_pt
from cutaway.core.refuse import Refused

_OWNER = "NeelNanda"


class Files:
    """The files of one model, in a folder or on the hub.

    Attributes:
        name: the folder, or the repository.
        settings: what its config.json says.
    """

    def __init__(self, name: str):
        self.name, self.folder = name, Path(name) if Path(name).is_dir() else None
        self.settings: dict[str, Any] = json.loads(self.path("config.json").read_text("utf-8"))

    def path(self, file: str) -> Path:
        """Return a file's path here; of a repository it is fetched first."""
        if self.folder is not None:
            return self.folder / file
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.name, file))

    def checkpoints(self) -> dict[int, str]:
        """Return the checkpoints' files by their label, a number of steps or tokens, in order."""
        if self.folder is not None:
            names = [p.relative_to(self.folder).as_posix() for p in self.folder.glob("checkpoints/*.pth")]
        else:
            from huggingface_hub import HfApi

            names = HfApi().list_repo_files(self.name)
        labels = {int(m[1]): n for n in names if (m := re.match(r"checkpoints/.*_(\d+)\.pth", n))}
        return dict(sorted(labels.items()))

    def weights(self, label: int | None) -> dict[str, Tensor]:
        """Return the final weights, or those of a checkpoint, as plain tensors."""
        return read_pt(self.path("model_final.pth" if label is None else self.checkpoints()[label]))

    def configuration(self, **given: Any) -> Config:
        """Return the configuration that the settings mean."""
        s = self.settings
        own = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn", "attn_only")
        norm = s.get("normalization", s.get("normalization_type"))
        positions = "shortformer" if s.get("shortformer_pos") else "standard"
        tokenizer = str(s.get("tokenizer_name") or "") or None
        return Config(
            **{n: s[n] for n in own},
            model_name=self.name.split("/")[-1],
            final_rms=s.get("final_rms", False),
            normalization_type=norm,
            positional_embedding_type=positions,
            tokenizer_name=MODELS.get(str(tokenizer), tokenizer),
            init_weights=False,
            original_architecture=s.get("architecture", "neel"),
            **given,
        )


def native_files(name: Any) -> Files | None:
    """Return the files of a native model's name, repository or folder; None of any other model."""
    known = MODELS.get(name, name)
    if known is name and (full := NAMES["native"].get(str(name))) is not None:
        return Files(MODELS.get(full, full))
    config = Path(known) / "config.json" if isinstance(known, str | Path) else None
    if config is not None and config.is_file():
        return None if "model_type" in json.loads(config.read_text("utf-8")) else Files(str(known))
    return Files(str(known)) if str(known).startswith(f"{_OWNER}/") else None


def get_checkpoint_labels(model_name: str, **_: Any) -> tuple[list[int], str]:
    """Return the labels of a model's checkpoints, and what they count: "step" or "token".

    Raises:
        Refused: a model whose checkpoints are not known here.
    """
    files = native_files(model_name)
    if files is not None:
        labels = list(files.checkpoints())
    elif any(known in model_name for known in CHECKPOINTED):
        labels = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000)]
    else:
        instead = "load the revision: cutaway.load('org/name@revision')"
        raise Refused(f"checkpoints of {model_name}", "they are not known here", instead)
    return labels, "token" if labels and labels[-1] > 1e9 else "step"


def chosen(model_name: str, index: int | None, value: int | None) -> int | None:
    """Return the label of the checkpoint that is asked for; None for the final weights.

    Raises:
        Refused: no such checkpoint.
    """
    if index is None and value is None:
        return None
    labels = get_checkpoint_labels(model_name)[0]
    if value is not None and value not in labels:
        raise Refused(
            f"checkpoint_value={value}", "there is none of that label", f"use one of {labels[:3]} … {labels[-1]}"
        )
    if index is not None and not -len(labels) <= index < len(labels):
        raise Refused(f"checkpoint_index={index}", f"there are {len(labels)} checkpoints", "use a smaller one")
    return value if value is not None else labels[int(index or 0)]


CHECKPOINTED = ("pythia",)  # training runs whose revisions are known here: step0 … step143000


def loaded(kind: Any, files: Files, label: int | None, tokenizer: Any, dtype: Any, **given: Any) -> Any:
    """Return the native model of some files, with the final weights or a checkpoint's."""
    cfg = files.configuration(dtype=dtype or torch.float32, **given)
    cfg.from_checkpoint, cfg.checkpoint_value = label is not None, label
    model = kind(cfg, tokenizer)
    model.load_state_dict({n: t.to(cfg.dtype) for n, t in files.weights(label).items()}, strict=False)
    return model
