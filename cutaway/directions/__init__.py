"""Directions: vectors of activation space, found, probed, saved, and used in edits."""

from cutaway.directions.direction import Direction, direction
from cutaway.directions.direction import open_direction as open
from cutaway.directions.direction import write_direction as write

__all__ = ["Direction", "direction", "open", "write"]
