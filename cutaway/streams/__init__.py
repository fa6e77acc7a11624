"""Tokens to activations: documents, packing, truncated forwards, live streams, activations on disk, running moments."""

import cutaway.streams.subject  # noqa: F401  (the row of the table of subjects)
from cutaway.models.moments import Moments
from cutaway.streams.batch import Batch, Stream
from cutaway.streams.harvest import harvest
from cutaway.streams.live import LiveStream
from cutaway.streams.masks import Masking
from cutaway.streams.packing import Packing
from cutaway.streams.shards import Shards
from cutaway.streams.sources import Documents, documents, from_ids, from_json_lines, from_text_files, from_texts

__all__ = [
    "Batch",
    "Documents",
    "LiveStream",
    "Masking",
    "Moments",
    "Packing",
    "Shards",
    "Stream",
    "documents",
    "from_ids",
    "from_json_lines",
    "from_text_files",
    "from_texts",
    "harvest",
]
