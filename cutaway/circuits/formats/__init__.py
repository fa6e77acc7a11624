"""Circuits in the files and under the names of other tools."""
