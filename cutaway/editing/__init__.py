"""Knowledge editing: facts rewritten in weights, and an account of what an edit changed beside them."""

from cutaway.editing.knowledge_edit import KnowledgeEdit
from cutaway.editing.layouts import from_jsonl
from cutaway.editing.request import Probe, Request, Requests
from cutaway.editing.rome import rome
from cutaway.editing.subject import open_requests
from cutaway.editing.world import from_world

__all__ = [
    "KnowledgeEdit",
    "Probe",
    "Request",
    "Requests",
    "from_jsonl",
    "from_world",
    "open_requests",
    "rome",
]
