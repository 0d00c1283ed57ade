"""SHARE: attach factors, share, unshare, ties, refit."""
