"""Suites: questions that take several methods, and their answers with every control beside them."""
