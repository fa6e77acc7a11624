"""Knowledge editing: facts rewritten in weights, and an account of what an edit changed beside them."""

from cutaway.editing.alpha_edit import alpha_edit
from cutaway.editing.emmet import emmet
from cutaway.editing.knowledge_edit import KnowledgeEdit
from cutaway.editing.layouts import from_jsonl
from cutaway.editing.memit import memit
from cutaway.editing.request import Probe, Request, Requests
from cutaway.editing.rome import rome
from cutaway.editing.subject import open_requests
from cutaway.editing.world import from_world

__all__ = [
    "KnowledgeEdit",
    "Probe",
    "Request",
    "Requests",
    "alpha_edit",
    "emmet",
    "from_jsonl",
    "from_world",
    "memit",
    "open_requests",
    "rome",
]
