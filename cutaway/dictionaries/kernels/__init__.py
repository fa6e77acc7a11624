"""Kernels: the sparse products and selections that dictionaries run on."""
