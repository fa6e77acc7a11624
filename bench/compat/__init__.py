"""Peers of the façades: references of tests, and notebooks run side by side."""
