"""The identities behind the self-check."""
