"""Metrics of the mismatch between two policies; definitions and signs are in `metrics.catalog`.

Nothing is imported here, so that `metrics.catalog`, which needs no numpy, stays cheap for the command line's help.
"""
