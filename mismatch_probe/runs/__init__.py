"""Run folders: what a command writes, continues with `--resume`, and reports again."""
