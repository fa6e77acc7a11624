"""The command line: `cutaway explain`, a subcommand for every method, and looks at models, tasks and results.

Data goes to stdout, progress and refusals to stderr. Exit codes: 0 done, 2 refused, 130 interrupted.
"""

from cutaway.cli.app import main

__all__ = ["main"]
