"""Pickles and torch files as data: nothing that they name is imported, and nothing of them is called.

`machine.py` interprets the opcodes of a pickle, `rebuild.py` makes arrays of what numpy and torch wrote, `files.py`
reads files, and `classes.py` finds the keys in what frameworks pickle. torch itself is not used.
"""
