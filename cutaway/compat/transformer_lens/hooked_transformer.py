"""HookedTransformer and TransformerBridge: TransformerLens' models, native or bridged to a house model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.compat.transformer_lens import bridged, native, utils, weight_processing
from cutaway.compat.transformer_lens.activation_cache import ActivationCache
from cutaway.compat.transformer_lens.config import HookedTransformerConfig
from cutaway.compat.transformer_lens.factored_matrix import FactoredMatrix
from cutaway.compat.transformer_lens.generation import generated, prompt_mask
from cutaway.compat.transformer_lens.hook_points import HookedRootModule, HookPoint
from cutaway.compat.transformer_lens.loading import configuration, own_model
from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

_SWITCHES = {
    "attn.hook_result": "use_attn_result", "hook_q_input": "use_split_qkv_input", "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input", "hook_mlp_in": "use_hook_mlp_in", "hook_attn_in": "use_attn_in",
}  # fmt: skip
_STACKED = {n: f"attn.{n}" for n in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")} | {
    n: f"mlp.{n}" for n in ("W_in", "W_gate", "W_out", "b_in", "b_out")
}
_SINGLE = {"W_E": "embed", "W_pos": "pos_embed", "W_U": "unembed", "b_U": "unembed"}


class Output(NamedTuple):
    """Logits [batch pos d_vocab] and loss."""

    logits: Tensor
    loss: Tensor


class HookedTransformer(HookedRootModule):
    """A language model with a hook point at every activation.

    Made from a configuration it is native: its own trainable parameters, named and shaped as TransformerLens names
    them. Made by `from_pretrained` it is bridged: a copy of a Hugging Face model whose taps call the hook points.

    Attributes:
        cfg: the configuration.
        tokenizer: the tokenizer, or None.
        house: the house model that a bridged one runs; None of a native one.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
        _house: Model | None = None,
    ):
        super().__init__()
        if isinstance(cfg, str):
            raise ValueError("Please pass in a config dictionary or HookedTransformerConfig object")
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.tokenizer, self.dataset = None, None
        self.__dict__["house"] = _house
        if tokenizer is None and self.cfg.tokenizer_name is not None and _house is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.cfg.tokenizer_name)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side)
        elif self.cfg.d_vocab == -1:
            raise AssertionError("Must provide a tokenizer if d_vocab is not provided")
        self._grow()
        if _house is None and self.cfg.init_weights:
            self.init_weights()
        if _house is None and move_to_device:
            self.to(self.cfg.device)
        self.setup()

    def _grow(self) -> None:
        """Make the tree of components."""
        cfg = self.cfg
        if self.house is not None:
            self.original_model = self.house.hf
            for name, module in bridged.components(self.house, cfg).items():
                setattr(self, name, module)
        else:
            self.embed, self.hook_embed = native.Embed(cfg), HookPoint()
            if cfg.positional_embedding_type in ("standard", "shortformer"):
                self.pos_embed, self.hook_pos_embed = native.PosEmbed(cfg), HookPoint()
            self.blocks = nn.ModuleList(native.TransformerBlock(cfg, i) for i in range(cfg.n_layers))
            if cfg.normalization_type is not None:
                self.ln_final = native.norm(cfg, final=True)
            self.unembed = native.Unembed(cfg)
        if cfg.use_hook_tokens:
            self.hook_tokens = HookPoint()

    def setup(self) -> None:
        """Name every hook point, and find its place in the model."""
        super().setup()
        if self.house is not None:
            self.hook_dict = {n: p for n, p in self.hook_dict.items() if not n.startswith("original_model.")}
            self.mod_dict = {n: m for n, m in self.mod_dict.items() if not n.startswith("original_model")}
            found = bridged.places(self.house, self.cfg)
            self.__dict__["places"] = {n: p for n, p in found.items() if n in self.mod_dict}

    # --- loading

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: Any = None,
        device: Any = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> Any:
        """Return a bridged model of a name, a folder, or the live model `hf_model`; folded and centred by default.

        The weights are a copy: the user's model stays as it is.

        Raises:
            Refused: several devices, a checkpoint, or a model that is not here.
        """
        if n_devices != 1:
            raise Refused(f"n_devices={n_devices}", "one copy on one device is made here", "load it with cutaway.load")
        if checkpoint_index is not None or checkpoint_value is not None:
            model_name = _checkpoint(model_name, checkpoint_index, checkpoint_value)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or options.get("torch_dtype")
        house = own_model(model_name, hf_model, tokenizer, dtype, device)
        prepend = True if default_prepend_bos is None else default_prepend_bos
        cfg = configuration(house, model_name.split("/")[-1], default_prepend_bos=prepend)
        model = cls(cfg, tokenizer or house.tokenizer, default_padding_side=default_padding_side, _house=house)
        model._process(
            fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices
        )
        return model.eval()

    @classmethod
    def from_pretrained_no_processing(cls, model_name: str, *args: Any, **options: Any) -> Any:
        """Return a bridged model with the weights as they are."""
        off = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
        return cls.from_pretrained(model_name, *args, **{**dict.fromkeys(off, False), **options})

    def _process(self, *which: bool) -> None:
        if not any(which):
            return
        state = weight_processing.process(self._weights(), self.cfg, *which)
        self.load_state_dict(state)
        if which[0]:
            if self.house is not None:
                bridged.clear_norms(self)
            self.cfg.normalization_type = f"{str(self.cfg.normalization_type)[:3].rstrip('P')}Pre"
            self._regrow_norms()

    def _regrow_norms(self) -> None:
        """Take the weights from the norms, which are folded."""
        for name, module in list(self.mod_dict.items()):
            if name.rpartition(".")[2] in ("ln1", "ln2", "ln_final", "ln"):
                module.__dict__["weights" if self.house is not None else "pre"] = {} if self.house is not None else True
                for weight in ("w", "b"):
                    module._parameters.pop(weight, None)
        self.setup()

    def load_and_process_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Load a state dict, folded and centred as asked."""
        self.load_state_dict(dict(state_dict))
        self._process(
            fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices
        )

    def process_weights_(self, *which: bool, **named: bool) -> None:
        """Fold and centre the weights in place."""
        self.load_and_process_state_dict(self._weights(), *which, **named)

    def init_weights(self) -> None:
        """Draw the weights anew."""
        native.initialise(self, self.cfg)

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights under TransformerLens' names, without buffers."""
        if self.house is None:
            return {n: p.detach() for n, p in self.named_parameters()}
        parts = {n: m for n, m in self.mod_dict.items() if isinstance(m, bridged.Part)}
        shared = ("W_K", "W_V", "b_K", "b_V") if self.cfg.n_key_value_heads is not None else ()
        reads = {f"{n}.{w}": read for n, m in parts.items() for w, read in m.weights.items() if w not in shared}
        return {name: read().detach() for name, read in reads.items()}

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return the weights under TransformerLens' names."""
        return super().state_dict(*args, **options) if self.house is None else self._weights()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under TransformerLens' names; buffers of other versions (mask, IGNORE) are left out."""
        buffers = {n for n, _ in self.named_buffers()} if self.house is None else set()
        own = {
            n: t for n, t in state_dict.items() if not n.endswith((".mask", ".IGNORE", ".rotary_sin", ".rotary_cos"))
        }
        if self.house is not None:
            bridged.store(self, own)
            return None
        kept = {n: t for n, t in self.state_dict().items() if n in buffers}
        own = {n: t for n, t in own.items() if n not in buffers}
        folded = strict and not str(self.cfg.normalization_type).endswith("Pre")
        if folded:  # norms that were folded into the state dict have weight one and no bias
            norms = {
                n: p for n, p in self.named_parameters() if n.rpartition(".")[0].rpartition(".")[2].startswith("ln")
            }
            kept |= {n: torch.ones_like(p) if n.endswith("w") else torch.zeros_like(p) for n, p in norms.items()}
        return super().load_state_dict(kept | own, strict, assign)

    def __getattr__(self, name: str) -> Any:
        if name in _STACKED and "blocks" in self._modules:
            part, weight = _STACKED[name].split(".")
            return torch.stack([getattr(getattr(b, part), weight) for b in self.blocks], dim=0)
        if name in _SINGLE:
            return getattr(super().__getattr__(_SINGLE[name]), name)
        return super().__getattr__(name)

    # --- switches

    def check_hooks_to_add(self, hook_point: HookPoint, hook_point_name: str, hook: Any, **_: Any) -> None:
        """Refuse a hook on a point that its switch keeps from firing, or that this model does not pass.

        Raises:
            Refused: the hook would never fire.
        """
        switch = next((s for end, s in _SWITCHES.items() if hook_point_name.endswith(end)), None)
        if switch is not None and not getattr(self.cfg, switch):
            raise SilentHook(
                f"hook {hook_point_name!r}",
                f"cfg.{switch} is off, so it would never fire",
                f"call model.set_{switch}(True)",
            )
        first = hook_point_name.split(".hook_sae")[0]
        if self.house is not None and switch is None and first not in self.places and first != "hook_tokens":
            raise SilentHook(f"hook {hook_point_name!r}", "this model never passes there", "see model.places")

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Switch `attn.hook_result` on or off."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Switch `hook_q_input`, `hook_k_input` and `hook_v_input` on or off."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Switch `hook_mlp_in` on or off."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Switch `hook_attn_in` on or off."""
        if use_attn_in and self.cfg.n_key_value_heads is not None:
            raise AssertionError("Can't use attn_in with GQA")
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Refuse to ungroup shared keys and values.

        Raises:
            Refused: it is asked to.
        """
        if ungroup_grouped_query_attention:
            raise Refused(
                "ungrouped key-value heads", "hooks see the keys that the model has", "repeat them in the hook"
            )

    # --- tokens

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use a tokenizer, a copy of it, with padding and beginning tokens where it has none."""
        if default_padding_side not in (None, "left", "right"):
            raise AssertionError(f"padding_side must be 'right', 'left' or 'None', got {default_padding_side}")
        self.tokenizer = t = copy.deepcopy(tokenizer)
        t.padding_side = default_padding_side or "right"
        self.cfg.tokenizer_prepends_bos = len(t.encode("")) > 0
        t.eos_token = t.eos_token or "<|endoftext|>"
        t.pad_token, t.bos_token = t.pad_token or t.eos_token, t.bos_token or t.eos_token
        if self.cfg.d_vocab == -1:
            self.cfg.d_vocab = max(t.get_vocab().values()) + 1
        if self.cfg.d_vocab_out == -1:
            self.cfg.d_vocab_out = self.cfg.d_vocab

    def _side(self, padding_side: str | None) -> str:
        return padding_side or (self.tokenizer.padding_side if self.tokenizer is not None else "right")

    def _bos(self, prepend_bos: bool | None) -> bool:
        return self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Return the token ids of a text, or of several, padded."""
        t, prepend = self.tokenizer, self._bos(prepend_bos)
        if t is None:
            raise AssertionError("Cannot use to_tokens without a tokenizer")
        if prepend and not self.cfg.tokenizer_prepends_bos:
            input = utils.get_input_with_manually_prepended_bos(t.bos_token, input)
        before, t.padding_side = t.padding_side, self._side(padding_side)
        limit = {"truncation": True, "max_length": self.cfg.n_ctx} if truncate else {}
        try:
            ids = t(input, return_tensors="pt", padding=True, **limit)["input_ids"]
            if not prepend and self.cfg.tokenizer_prepends_bos:
                ids = utils.get_tokens_with_bos_removed(t, ids)
        finally:
            t.padding_side = before
        return ids.to(self.cfg.device) if move_to_device else ids

    def to_string(self, tokens: Any) -> str | list[str]:
        """Return the text of token ids, or of each row of them."""
        tokens = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens)
        if tokens.ndim > 2:
            raise ValueError(f"Invalid shape passed in: {tokens.shape}")
        decode = self.tokenizer.batch_decode if tokens.ndim == 2 else self.tokenizer.decode
        return decode(tokens, clean_up_tokenization_spaces=False)

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None) -> Any:
        """Return the text of every token: of a text, of ids, or of each of several."""
        if isinstance(input, list):
            return [self.to_str_tokens(one, prepend_bos, padding_side) for one in input]
        if isinstance(input, str):
            ids: Any = self.to_tokens(input, prepend_bos, padding_side)[0]
        elif isinstance(input, Tensor | np.ndarray):
            ids = input.squeeze()
            ids = ids[None] if ids.ndim == 0 else ids
            if ids.ndim != 1:
                raise AssertionError(f"Invalid tokens input to to_str_tokens, has shape: {ids.shape}")
        else:
            raise ValueError(f"Invalid input type to to_str_tokens: {type(input)}")
        return self.tokenizer.batch_decode([[int(i)] for i in ids], clean_up_tokenization_spaces=False)

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token."""
        token = self.to_tokens(string, prepend_bos=False).squeeze()
        if token.shape:
            raise AssertionError(f"Input string: {string} is not a single token!")
        return int(token.item())

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of one id."""
        if not isinstance(int_token, int):
            raise AssertionError(f"{int_token!r} is no token id")
        return self.to_str_tokens(torch.tensor([int_token]))[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Return where a token stands in a text or in ids: its first or last place."""
        ids = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else torch.as_tensor(input)
        ids = ids.squeeze(0) if ids.ndim == 2 else ids
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        found = (ids == wanted).nonzero().flatten()
        if not len(found):
            raise AssertionError(f"The token {single_token!r} does not occur in the prompt")
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', not {mode}")
        return int(found[0 if mode == "first" else -1])

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*token d_model"]:
        """Return the columns of W_U of tokens: of one, a list, or a tensor of them."""
        if isinstance(tokens, Tensor) and tokens.numel() > 1:
            return self.W_U[:, tokens].moveaxis(0, -1)
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U[:, int(tokens)]

    # --- running

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        shortformer_pos_embed: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
    ) -> Any:
        """Run the model on a text, texts, token ids, or the stream [batch pos d_model] that enters `start_at_layer`.

        Returns logits, the "loss", "both" or None; with `stop_at_layer`, the stream that enters that layer.
        """
        mask, side = attention_mask, self._side(padding_side)
        if start_at_layer is None:
            if isinstance(input, str | list):
                input = self.to_tokens(input, prepend_bos, side)
            tokens = input[None] if input.ndim == 1 else input
            tokens = tokens.to(self.cfg.device)
            if mask is None and (side == "left" or past_kv_cache is not None):
                mask = prompt_mask(self, tokens, self._bos(prepend_bos), side)
                mask = torch.ones_like(tokens) if mask is None and past_kv_cache is not None else mask
            if past_kv_cache is not None:
                mask = past_kv_cache.append_attention_mask(mask)
            if self.cfg.use_hook_tokens:
                tokens = self.hook_tokens(tokens)
        n = self.cfg.n_layers
        start = range(n)[start_at_layer] if start_at_layer is not None and start_at_layer != n else start_at_layer or 0
        stop = None if stop_at_layer is None else slice(None, stop_at_layer).indices(n)[1]
        given = (tokens, None) if start_at_layer is None else (None, input)
        want = return_type is not None
        run = self._run_native if self.house is None else self._run_bridged
        out = run(*given, want, start, stop, mask, shortformer_pos_embed, past_kv_cache)
        if stop is not None or not want or return_type == "logits":
            return out
        if tokens is None:
            raise AssertionError("tokens must be passed in if return_type is 'loss' or 'both'")
        loss = self.loss_fn(out, tokens, mask, loss_per_token)
        if return_type not in ("loss", "both"):
            logging.warning("Invalid return_type passed in: %s", return_type)
            return None
        return loss if return_type == "loss" else Output(out, loss)

    def _run_native(
        self, tokens: Any, stream: Any, want: bool, start: int, stop: int | None, mask: Any, pos: Any, cache: Any
    ) -> Any:
        if stream is None:
            past = cache.length if cache is not None else 0
            stream = self.hook_embed(self.embed(tokens))
            kind = self.cfg.positional_embedding_type
            if kind in ("standard", "shortformer"):
                pos = self.hook_pos_embed(self.pos_embed(tokens, past, mask))
                stream, pos = (stream + pos, None) if kind == "standard" else (stream, pos)
        for i in range(start, self.cfg.n_layers if stop is None else stop):
            stream = self.blocks[i](stream, pos, None if cache is None else cache[i], mask)
        if stop is not None:
            return stream
        if self.cfg.normalization_type is not None:
            stream = self.ln_final(stream)
        logits, cap = self.unembed(stream) if want else None, self.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if want and cap > 0 else logits

    def _run_bridged(
        self, tokens: Any, stream: Any, want: bool, start: int, stop: int | None, mask: Any, pos: Any, cache: Any
    ) -> Any:
        if cache is not None:
            return bridged.run_cached(self, tokens, mask, cache)
        ids = tokens if stream is None else torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        none = ((),) * len(ids)
        side = "left" if mask is not None and not bool(real[:, 0].all()) else "right"
        return bridged.run(self, Tokens(ids, real, ("",) * len(ids), none, none, side), want, start, stop, stream)

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Return the loss of predicting the next token."""
        return utils.lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def run_with_cache(
        self, *args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **options: Any
    ) -> Any:
        """Run the model and return its output and the activations, as an `ActivationCache` or a dictionary."""
        out, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **options)
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim) if return_cache_object else cache

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str | None = "input",
        verbose: bool = True,
        **options: Any,
    ) -> Any:
        """Sample tokens one by one, under the hooks; several texts are padded on the left."""
        if unknown := set(options) - {"output_logits", "return_dict_in_generate"}:
            logging.warning("generate: these options do nothing here: %s", ", ".join(sorted(unknown)))
        text = isinstance(input, str | list)
        side = "left" if isinstance(input, list) and len(input) > 1 else self._side(padding_side)
        ids = self.to_tokens(input, prepend_bos, side) if text else input.to(self.cfg.device)
        ids = ids[None] if ids.ndim == 1 else ids
        stops = list[int]()
        if stop_at_eos:
            eos = eos_token_id if eos_token_id is not None else getattr(self.tokenizer, "eos_token_id", None)
            if eos is None:
                raise AssertionError("Must pass a eos_token_id if stop_at_eos is True and tokenizer is None")
            stops = [eos] if isinstance(eos, int) else list(eos)
        mask = prompt_mask(self, ids, self._bos(prepend_bos), side)
        how = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "freq_penalty": freq_penalty}
        out = generated(self, ids, mask, max_new_tokens, stops, use_past_kv_cache, do_sample, verbose, **how)
        if return_type == "tokens" or (return_type == "input" and not text):
            return out
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in out]
        return texts[0] if len(texts) == 1 else texts

    # --- weights

    def to(self, *args: Any, **options: Any) -> Any:
        """Move the model, or cast it."""
        super().to(*args, **options)
        first = next(self.parameters())
        self.cfg.device, self.cfg.dtype = str(first.device), first.dtype
        return self

    def cuda(self, device: Any = None) -> Any:
        """Move the model to a GPU."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> Any:
        """Move the model to the CPU."""
        return self.to("cpu")

    @property
    def n_params_total(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab+n_ctx d_model"]:
        """W_E and W_pos below each other."""
        return torch.cat([self.W_E, self.W_pos], dim=0)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ of all layers and heads."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of all layers and heads."""
        return FactoredMatrix(self.W_V, self.W_O)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """Return the sum of all biases written into the stream before a layer (and its attention, with `mlp_input`)."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases and not self.cfg.attn_only else 0)
        return total + self.blocks[layer].attn.b_O if mlp_input else total

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer head"]:
        """Return the Q-, K- or V-composition score of every head with every head of a later layer."""
        left = self.OV
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode must be one of ['Q', 'K', 'V'] not {mode}")
        right = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}[mode]()
        scores = utils.composition_scores(left, right, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        return torch.where((layers[:, None] < layers)[:, None, :, None], scores, torch.zeros_like(scores))

    def all_head_labels(self) -> list[str]:
        """Return L0H0, L0H1 …"""
        return [f"L{i}H{h}" for i in range(self.cfg.n_layers) for h in range(self.cfg.n_heads)]


class SilentHook(Refused, AssertionError):
    """Refusal of a hook that would never fire; TransformerLens asserts that, where it notices."""


def _checkpoint(name: str, index: int | None, value: int | None) -> str:
    """Return the name with the revision of a training checkpoint (Pythia's)."""
    steps = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000), 143000]
    steps = sorted(set(steps))
    if "pythia" not in name:
        raise Refused(f"a checkpoint of {name}", "only Pythia's are known here", "give the revision: org/name@revision")
    return f"EleutherAI/{name.split('/')[-1]}@step{steps[index] if index is not None else value}"


class TransformerBridge(HookedTransformer):
    """TransformerLens 3's and 4's bridge: raw weights, until `enable_compatibility_mode` folds and centres them."""

    @classmethod
    def boot_transformers(
        cls,
        model_name: str,
        device: Any = None,
        dtype: Any = None,
        hf_model: Any = None,
        tokenizer: Any = None,
        **_: Any,
    ) -> Any:
        """Return a bridged model with the weights as they are."""
        return cls.from_pretrained_no_processing(
            model_name, device=device, dtype=dtype, hf_model=hf_model, tokenizer=tokenizer
        )

    @classmethod
    def boot_native(cls, config: Any, tokenizer: Any = None, **_: Any) -> Any:
        """Return a native model of a configuration."""
        return cls(HookedTransformerConfig.unwrap(config), tokenizer)

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Fold and centre the weights, as `HookedTransformer.from_pretrained` does."""
        if not no_processing:
            self._process(
                fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices
            )
