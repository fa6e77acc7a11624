"""Anatomy: what a live model is made of, read through its family row."""
