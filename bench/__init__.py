"""Speed and parity against peers, measured side by side: `python -m bench.<name>`; results are committed as JSON.

Peers live in environments of their own (`bench/envs`) and are given the same weights and the same tokens.
"""
