"""Models with transcoders of their MLPs: activations of features, and interventions on them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway import dictionaries, load
from cutaway.compat import MODELS
from cutaway.compat.aliases import NAMES
from cutaway.compat.circuit_tracer.interventions import Intervention, Seen, SetFeatures, activations
from cutaway.compat.transformer_lens.loading import WITHOUT_BOS
from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries import Dictionary, formats
from cutaway.graphs.latents import as_transcoders
from cutaway.models.anatomy.norms import measure
from cutaway.models.edits.edit import Edit, as_edits
from cutaway.models.edits.keep import Read
from cutaway.models.edits.library import Freeze
from cutaway.models.generate import generated_ids
from cutaway.models.model import Model
from cutaway.models.vocabulary import special_ids

_CHATS = re.compile("gemma-3.*-it$")  # models whose prompts begin with a turn of the user, by circuit-tracer's rule
_TURN = [2, 105, 2364, 107]  # <bos><start_of_turn>user\n
_SCALES = ("ln1.scale", "ln2.scale", "final.scale")
_SAMPLING = ("temperature", "top_k", "top_p")


class ReplacementModel:
    """A model beside transcoders of its MLPs; whatever else it is asked for, `HookedTransformer` answers.

    Attributes:
        house: the model.
        transcoders: the dictionary.
        scan: the name of the transcoders.
        leading: the positions at which features count as inactive.
    """

    backend = "transformerlens"

    def __init__(self, house: Model, transcoders: Dictionary, name: str, scan: str | None):
        self.house, self.name, self.tokenizer = house, name, house.tokenizer
        self.transcoders, self.scan = transcoders, transcoders.about.get("scan") or scan
        self.over = as_transcoders(transcoders.to(house.device, house.dtype), house.shape.n_layers)
        self.leading = len(_TURN) if _CHATS.search(name) else 1

    @classmethod
    def from_pretrained(cls, model_name: str, transcoder_set: str, **kwargs: Any) -> ReplacementModel:
        """Load a model and its transcoders, each by a name of `compat.MODELS`, a folder or a name of the hub."""
        found = MODELS.get(transcoder_set, NAMES["transcoders"].get(transcoder_set, transcoder_set))
        return cls.from_pretrained_and_transcoders(model_name, found, scan=transcoder_set, **kwargs)

    @classmethod
    def from_pretrained_and_transcoders(
        cls,
        model_name: str,
        transcoders: Dictionary | str,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        scan: str | None = None,
        **kwargs: Any,
    ) -> ReplacementModel:
        """Load a model beside transcoders; backends and lazy loading make no difference here."""
        found = MODELS.get(model_name, model_name)
        wide = torch.promote_types(dtype, torch.float32)  # in less, graphs do not close
        given = {"dtype": str(wide).removeprefix("torch.")} | ({"device": str(device)} if device else {})
        house = found if isinstance(found, Model) else load(found, **given)
        made = transcoders if isinstance(transcoders, Dictionary) else _opened(transcoders, house)
        sys.stdout.write(f"Loaded pretrained model {model_name} into HookedTransformer\n")
        return cls(house, made, model_name, scan)

    @cached_property
    def cfg(self) -> SimpleNamespace:
        """The sizes of the model under circuit-tracer's names."""
        s, where = self.house.shape, getattr(self.tokenizer, "name_or_path", None) or self.name
        sizes = {name: getattr(s, name) for name in ("n_layers", "d_model", "d_head", "n_heads", "d_vocab")}
        return SimpleNamespace(**sizes, model_name=self.name, tokenizer_name=str(where), dtype=self.house.dtype)

    @cached_property
    def hooked(self) -> Any:
        """The model as a `HookedTransformer`, its weights as they are."""
        from cutaway.compat.transformer_lens import HookedTransformer

        given = {"hf_model": self.house.hf, "tokenizer": self.tokenizer}
        return HookedTransformer.from_pretrained_no_processing(self.name, **given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.hooked, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hooked(*args, **kwargs)

    def ensure_tokenized(self, prompt: str | Tensor | list[int]) -> Int[Tensor, "position"]:
        """Return the ids of a prompt, with a special token in front."""
        t, special = self.tokenizer, special_ids(self.tokenizer)
        ids = t(prompt, add_special_tokens=False).input_ids if isinstance(prompt, str) else prompt
        ids = torch.as_tensor(ids, device=self.house.device).reshape(-1)
        if self.leading > 1 and ids[: len(_TURN)].tolist() != _TURN:
            raise Refused(f"prompt {prompt!r}", "it does not begin with a turn of the user", "apply the chat template")
        ends = [i for i in (t.bos_token_id, t.pad_token_id, t.eos_token_id, *special) if i is not None]
        return ids if int(ids[0]) in special or not ends else torch.cat([ids.new_tensor(ends[:1]), ids])

    def get_activations(
        self, inputs: Any, sparse: bool = False, apply_activation_function: bool = True
    ) -> tuple[Float[Tensor, "1 position token"], Float[Tensor, "layer position latent"]]:
        """Return logits and the activations of features."""
        return self.feature_intervention(inputs, (), None, True, apply_activation_function, sparse)

    def feature_intervention(
        self,
        inputs: Any,
        interventions: Sequence[Intervention],
        constrained_layers: range | None = None,
        freeze_attention: bool = True,
        apply_activation_function: bool = True,
        sparse: bool = False,
        return_activations: bool = True,
    ) -> tuple[Float[Tensor, "1 position token"], Any]:
        """Return logits and activations while features have other values.

        Attention patterns are those of the plain run with `freeze_attention`. With `constrained_layers` the MLPs of
        these layers are held, too, but for what the features write to them, and all norms' divisors if these are all.
        """
        ids = self._ids(inputs)
        edits = self._edits(ids, interventions, constrained_layers, freeze_attention)
        seen = self.house.capture(ids, [*self.transcoders.reads, "logits"], edits)
        return seen["logits"], self._stacked(seen, apply_activation_function, sparse) if return_activations else None

    def feature_intervention_generate(
        self,
        inputs: Any,
        interventions: Sequence[Intervention],
        constrained_layers: range | None = None,
        freeze_attention: bool = True,
        apply_activation_function: bool = True,
        sparse: bool = False,
        return_activations: bool = True,
        max_new_tokens: int = 10,
        do_sample: bool = True,
        stop_at_eos: bool = True,
        **kwargs: Any,
    ) -> tuple[str, Float[Tensor, "step token"], Any]:
        """Continue a prompt while features have other values: the text, the logits of each step, and activations.

        What is frozen is frozen in the prompt; positions without an end go on in the new tokens.
        """
        ids, seen = self._ids(inputs), Seen()
        edits = self._edits(ids, interventions, constrained_layers, freeze_attention)
        edits += [Read(site, seen) for site in (*self.transcoders.reads, "logits")]
        options = {k: kwargs[k] for k in _SAMPLING if do_sample and k in kwargs} | {"do_sample": do_sample}
        options |= {} if stop_at_eos else {"eos_token_id": None}
        new = generated_ids(self.house, self.house.tokens(ids), max_new_tokens, as_edits(edits), options)[0]
        logits = torch.cat([step[0, -1:] for step in seen.sites.pop("logits")])
        reads = {site: torch.cat(steps, 1) for site, steps in seen.sites.items()}
        found = self._stacked(reads, apply_activation_function, sparse) if return_activations else None
        return self.tokenizer.decode(torch.cat([ids, new.to(ids)]), skip_special_tokens=True), logits, found

    def _ids(self, inputs: Any) -> Int[Tensor, "position"]:
        bos = type(self.house.hf).__name__ not in WITHOUT_BOS
        ids = self.house.tokens(inputs, bos=bos).ids if isinstance(inputs, str) else torch.as_tensor(inputs)
        return ids.reshape(-1).to(self.house.device)

    @torch.no_grad()
    def _stacked(self, reads: Any, gated: bool, sparse: bool) -> Float[Tensor, "layer position latent"]:
        """Return the features of all layers, or what their gates read; 0 at leading positions."""
        parts = [activations(self.over, i, reads[f"mlp_in.{i}"], self.leading, gated) for i in self.over.reads]
        return torch.stack([part.to_sparse() for part in parts]).coalesce() if sparse else torch.stack(parts)

    def _edits(self, ids: Tensor, wanted: Sequence[Intervention], layers: range | None, freeze: bool) -> list[Edit]:
        """Return the edits of an intervention: what is frozen, and the features that are set."""
        n, house = self.house.shape.n_layers, self.house
        held = [f"pattern.{i}" for i in range(n)] if freeze or layers else []
        held += [f"mlp_out.{i}" for i in layers or ()]
        if layers and set(range(n)) <= set(layers):
            if any(house.anatomy.part(i, name) for i in range(n) for name in ("ln1_post", "ln2_post")):
                why = "divisors of norms behind attention and MLPs have no site here"
                raise Refused(Keyword("constrained_layers", layers), why, "leave a layer out")
            held += map(str, house.places([s for s in _SCALES if house.sites()[s].startswith("read")]))
        if not wanted:
            return []
        acts = house.capture(ids, [*held, *self.transcoders.reads], logits=False)
        return [*(Freeze(h, acts) for h in held), SetFeatures(self.over, wanted, self.leading, layers, acts)]


def _opened(where: str, house: Model) -> Dictionary:
    """Open transcoders; some read a norm before its weight is multiplied in, which the model has."""
    norms = {i: house.anatomy.part(i, "ln2") for i in range(house.shape.n_layers)}
    weights = {i: measure(norm, house.shape.d_model).weight for i, norm in norms.items() if norm is not None}
    given: dict[str, Any] = {"norm_weights": weights} if formats.detect(where) == ["circuit_tracer"] else {}
    return dictionaries.load(where, **given)
