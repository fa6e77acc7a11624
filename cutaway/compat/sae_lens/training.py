"""Contexts and activations of a dataset, and the training of SAEs on them: over `cutaway.streams` and the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.compat.sae_lens.configs import TABLE, LanguageModelSAERunnerConfig, extract_layer_from_tlens_hook_name
from cutaway.compat.sae_lens.sae import SAE
from cutaway.compat.transformer_lens.hooked_transformer import HookedTransformer
from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.dictionaries import training
from cutaway.dictionaries.gates import train_gate_of
from cutaway.dictionaries.objectives import term_of
from cutaway.models.anatomy.foreign_names import site_of_hook
from cutaway.streams import LiveStream, Masking, Packing, from_texts
from cutaway.streams.packing import Cursor, Packer
from cutaway.streams.sources import Documents, HubTexts, documents

_COLUMNS = ("tokens", "input_ids", "text", "problem")
# By whether contexts and documents begin with the beginning-of-text token.
_BOS = {(True, True): "both", (True, False): "context", (False, True): "document", (False, False): "none"}


class ActivationsStore:
    """Contexts of a dataset, and what the model has at a hook point on them, endlessly.

    Attributes:
        stream: activations in shuffled batches, with an exact cursor.
    """

    def __init__(self, model: Any, dataset: Any, hook_name: str, context_size: int, **words: Any):
        self.cfg = cfg = SimpleNamespace(**{**TABLE["run"], **words})
        self.model, self.hook_name, self.context_size = model, hook_name, context_size
        self.documents, tokenized = _opened(dataset, context_size)
        bos = "none" if tokenized else _BOS[bool(cfg.prepend_bos), cfg.sequence_separator_token is not None]
        self.packing = Packing(context_size, bos, across=not tokenized, rows=cfg.store_batch_size_prompts)
        self._contexts = self._rows()

    def __getattr__(self, word: str) -> Any:
        return getattr(vars(self).get("cfg"), word)

    @classmethod
    def from_sae(cls, model: Any, sae: SAE, dataset: Any, context_size: int | None = None, **words: Any) -> Any:
        """Return the store of the contexts that an SAE was trained on."""
        known, own = sae.cfg.metadata, {"store_batch_size_prompts": 8, "n_batches_in_buffer": 8}
        own |= {"prepend_bos": known.prepend_bos, "hook_head_index": known.hook_head_index}
        return cls(model, dataset, known.hook_name, context_size or known.context_size, **own | words)

    @classmethod
    def from_config(cls, model: Any, cfg: LanguageModelSAERunnerConfig, override_dataset: Any = None) -> Any:
        """Return the store that a run's configuration describes."""
        return cls(model, cfg.dataset_path if override_dataset is None else override_dataset, **vars(cfg))

    def _rows(self) -> Iterator[Int[Tensor, "position"]]:
        packer = Packer(self.documents, self.model.tokenizer, self.packing)
        while True:
            whole = 0
            for group in packer.contexts(Cursor()):
                whole += int(group.real.all(1).sum())
                yield from group.ids[group.real.all(1)]
            if not whole:
                why = f"its documents do not fill {self.context_size} tokens"
                raise Refused("a store of this dataset", why, "give a smaller context_size, or more of it")

    def get_batch_tokens(self, batch_size: int | None = None) -> Int[Tensor, "context position"]:
        """Return the next contexts."""
        rows = islice(self._contexts, batch_size or self.store_batch_size_prompts)
        return torch.stack(list(rows)).to(self.model.cfg.device)

    @torch.no_grad()
    def get_activations(self, batch_tokens: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_in"]:
        """Return what the model has at the hook point, heads side by side."""
        layer = extract_layer_from_tlens_hook_name(self.hook_name)
        run = {"names_filter": self.hook_name, "stop_at_layer": None if layer is None else layer + 1}
        acts = self.model.run_with_cache(batch_tokens, **run)[1][self.hook_name]
        return acts.flatten(2) if self.hook_head_index is None else acts[:, :, self.hook_head_index]

    @cached_property
    def stream(self) -> LiveStream:
        """The house's stream; its window is what `n_batches_in_buffer` contexts of a batch hold."""
        if getattr(self.model, "house", None) is None:
            why = "it was made from a configuration, and streams read models of the house"
            raise Refused("a stream of this model", why, "train on get_activations: cutaway.dictionaries.training.Held")
        site = site_of_hook(self.hook_name)[0]
        address = Address(site.site, site.layer, self.hook_head_index)
        masking = Masking(special=bool(self.exclude_special_tokens), sinks=None)
        window = self.n_batches_in_buffer * self.store_batch_size_prompts * self.context_size
        sizes = {"batch": self.train_batch_size_tokens, "window": window, "seed": self.seed, "epochs": None}
        return LiveStream(self.model.house, self.documents, address, packing=self.packing, masking=masking, **sizes)

    def next_batch(self) -> Float[Tensor, "token d_in"]:
        """Return the next activations, shuffled."""
        return next(iter(next(self.stream).acts.values()))

    __next__ = next_batch

    def __iter__(self) -> Any:
        return self


def _opened(dataset: Any, context: int) -> tuple[Documents, bool]:
    """Return the documents of a dataset, and True if they are token ids, of which each gives one context."""
    if isinstance(dataset, str) and Path(dataset).exists():
        return documents(dataset), False
    rows = HubTexts(dataset).rows() if isinstance(dataset, str) else dataset
    column = next((c for c in _COLUMNS if c in next(iter(rows))), None)
    if column is None:
        raise Refused("this dataset", f"it has none of the columns {', '.join(_COLUMNS)}", "rename its column")
    ids = column in _COLUMNS[:2]
    return from_texts(lambda: (row[column][:context] if ids else row[column] for row in rows), str(dataset)[:80]), ids


class LanguageModelSAETrainingRunner:
    """A training run: `LanguageModelSAETrainingRunner(cfg).run()` returns the trained SAE."""

    def __init__(self, cfg: LanguageModelSAERunnerConfig, override_dataset: Any = None, override_model: Any = None):
        self.cfg, given = cfg, cfg.model_from_pretrained_kwargs or {}
        load = HookedTransformer.from_pretrained_no_processing
        self.model = load(cfg.model_name, device=cfg.device, **given) if override_model is None else override_model
        self.activations_store = ActivationsStore.from_config(self.model, cfg, override_dataset)

    def run(self) -> Any:
        """Train the SAE, write it to `output_path`, and return it."""
        cfg, stream = self.cfg, self.activations_store.stream
        steps = max(1, cfg.training_tokens // cfg.train_batch_size_tokens)
        idle = [n for n, v in cfg.words.items() if n not in TABLE["used"] and getattr(cfg, n) != v]
        if idle:
            warnings.warn(f"words without effect here: {', '.join(idle)}; docs/compat.md says why", stacklevel=2)
        pace = {"warmup": cfg.lr_warm_up_steps / steps, "decay": cfg.lr_decay_steps / steps}
        plan = training.Plan(cfg.training_tokens, **pace, checkpoint_every=steps // (cfg.n_checkpoints + 1) + 1)
        wandb = cfg.logger.log_to_wandb and find_spec("wandb") is not None
        logs = training.wandb_log(cfg.logger.wandb_project, cfg.to_dict()) if wandb else nullcontext()
        out = cfg.checkpoint_path if cfg.n_checkpoints else None
        with logs as on_log:
            made = training.train(stream, recipe(cfg, steps), plan, out=out, device=cfg.device, on_log=on_log)
        sae = SAE.load_from_disk(made.dictionary, cfg.device, cfg.dtype)
        facts = ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path")
        sae.cfg.metadata.update({n: getattr(cfg, n) for n in facts})
        if cfg.output_path is not None:
            sae.save_model(cfg.output_path)
        return sae


SAETrainingRunner = LanguageModelSAETrainingRunner


def language_model_sae_runner(cfg: LanguageModelSAERunnerConfig) -> Any:
    """Train the SAE of a configuration and return it (versions 1 and 2)."""
    return LanguageModelSAETrainingRunner(cfg).run()


def recipe(cfg: LanguageModelSAERunnerConfig, steps: int) -> training.Recipe:
    """Return the house's recipe of a run of that many steps."""
    sae, row = cfg.sae, TABLE["training"][cfg.sae.architecture()]
    if sae.normalize_activations not in ("none", "expected_average_only_in"):
        why = "the trainer scales activations by one number"
        raise Refused(f"normalize_activations={sae.normalize_activations!r}", why, "use 'expected_average_only_in'")

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        own = {n: getattr(sae, v) if v in sae.words else v for n, v in part.items()}
        own |= {n: own[n] / steps for n, v in part.items() if str(v).endswith("_steps")}
        own |= {n: [w for w in v if w < sae.d_sae] for n, v in own.items() if isinstance(v, list)}
        return own | ({"k": int(own["k"])} if "k" in own else {})

    terms = row["terms"][sae.jumprelu_sparsity_loss_mode] if isinstance(row["terms"], dict) else row["terms"]
    site, decoder = site_of_hook(cfg.hook_name)[0], "unit" if "k" in sae.words else "free"
    how: dict[str, Any] = {
        "decoder": "norm_aware" if getattr(sae, "rescale_acts_by_decoder_norm", False) else decoder,
        "subtract": sae.apply_b_dec_to_input,
        "scaled": sae.normalize_activations != "none",
        "adam": training.AdamSettings(cfg.adam_beta1, cfg.adam_beta2),
    }
    address, gate = str(Address(site.site, site.layer, cfg.hook_head_index)), train_gate_of(filled(row["gate"]))
    objective = [term_of(filled(t)) for t in terms]
    return training.autoencoder(address, sae.d_sae, gate, objective, rate=cfg.lr, seed=cfg.seed, **how)
