"""Edges of the residual stream: which sites write it, which read it, who hears whom, and patches of single edges.

The stream is a sum, so every writer is heard by every reader after it. In a block whose attention and MLP run one after
the other, the MLP hears the attention of its own layer; in a parallel block it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutaway.core.address import Address, parse
from cutaway.core.node import Edge
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.edits.edit import Edit

EMBEDDING, ATTENTION, MLP = range(3)
# What each site writes into the stream, by the part of the block that it belongs to.
_WRITES = {
    "embed": EMBEDDING, "pos_embed": EMBEDDING, "z": ATTENTION, "head_out": ATTENTION, "attn_out": ATTENTION,
    "ssm.post": ATTENTION, "ssm.out": ATTENTION, "mlp_post": MLP, "mlp_out": MLP,
}  # fmt: skip
# What reads the stream: on its way into attention (or a state-space layer), into the MLP, or behind the last block.
_READS = {
    **dict.fromkeys(("resid_pre", "ln1.scale", "attn_in", "q_in", "k_in", "v_in", "q", "k", "v", "ssm.in"), ATTENTION),
    **dict.fromkeys(("resid_mid", "ln2.scale", "mlp_in", "mlp_pre", "mlp_gate", "router"), MLP),
}  # fmt: skip
_ENDS = ("resid_post", "final.scale", "logits")


@dataclass(frozen=True)
class EdgePatch:
    """The patch of an edge: `receivers` read the stream with the sender's edit in it, and nothing else does.

    What the receivers read is taken from a run with the sender's edit in which `frozen` holds other places at their
    values in the run that is patched; all other places between sender and receivers are recomputed. It is then put
    into the run that is patched. Where the receiver is `logits`, the first run is the result. A receiver that does not
    hear the sender keeps its value. `models.sweep.edges.sweep_edges` runs many of them.

    Attributes:
        sender: An edit of a site that writes the stream.
        receivers: Sites that read the stream, patched together; or `("logits",)`.
        frozen: Edits that hold places at their values in the run that is patched (`Freeze`).
    """

    sender: Edit
    receivers: tuple[Address | str, ...] = ("logits",)
    frozen: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        sites = [parse(r).site for r in self.receivers]
        if not sites or ("logits" in sites and len(sites) > 1):
            why = "it needs readers of the stream, or the logits alone"
            raise Refused(f"edge to {', '.join(map(str, self.receivers))}", why, "name q.3.1, mlp_in.4 or logits")
        place = self.sender.where
        if place.site not in _WRITES:
            raise Refused(f"edge from {place}", f"{place.site} does not write the stream", _list("writers", _WRITES))
        if unread := [s for s in sites if s not in (*_READS, "logits")]:
            raise Refused(f"edge to {unread[0]}", "it does not read the stream", _list("readers", _READS))

    @property
    def edges(self) -> list[Edge]:
        """The edges that are patched."""
        return [Edge(self.sender.where, parse(r)) for r in self.receivers]

    def heard(self, anatomy: Anatomy) -> list[Address]:
        """Return the receivers that hear the sender; none for the logits."""
        ends = [parse(r) for r in self.receivers]
        return [a for a in ends if a.site != "logits" and precedes(anatomy, self.sender.where, a)]


def writes(site: str) -> bool:
    """True if a site's values are added to the residual stream, directly or through one linear map."""
    return site in _WRITES


def reads(site: str) -> bool:
    """True if a site's values are computed from the residual stream alone, within its own layer."""
    return site in _READS or site in _ENDS


def precedes(anatomy: Anatomy, writer: Address, reader: Address) -> bool:
    """True if what `writer` adds to the residual stream is there when `reader` reads it.

    Raises:
        Refused: the first does not write the stream, or the second does not read it.
    """
    if writer.site not in _WRITES:
        raise Refused(f"writer {writer}", f"{writer.site} does not write the stream", _list("writers", _WRITES))
    if not reads(reader.site):
        raise Refused(f"reader {reader}", f"{reader.site} does not read the stream", _list("readers", _READS))
    if reader.site in ("final.scale", "logits"):
        return True
    at, part = writer.layer if writer.layer is not None else -1, _WRITES[writer.site]
    layer = reader.layer if reader.layer is not None else -1
    if at != layer or reader.site == "resid_post":
        return at <= layer
    return _READS[reader.site] == MLP and part == ATTENTION and not anatomy.parallel


def _list(kind: str, sites: dict[str, int]) -> str:
    return f"the {kind} are {', '.join(sites)}"
