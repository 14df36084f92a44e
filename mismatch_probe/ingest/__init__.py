"""Runs recorded elsewhere, read into one columnar form; nothing is measured here and nothing is re-tokenised.

A dump is a file or a folder. Its *container* (`containers.py`) makes records of files, a *format* (`formats/`) makes
rows of the generic format (`keys.py`) of a record, and the *collector* (`collect.py`) checks rows and writes them to
one Parquet file, from which everything else reads (`recording.py`). Nothing on this way holds a whole dump.
"""
