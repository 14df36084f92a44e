"""Runs recorded elsewhere, read into one columnar form; nothing is measured here and nothing is re-tokenised."""
