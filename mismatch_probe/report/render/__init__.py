"""Renderers: HTML, Markdown and terminal. They know the blocks of a report and no command."""
