"""Stores of features in the formats of other tools."""
