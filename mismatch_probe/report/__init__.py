"""Tables turned into figures, HTML, Markdown and terminal output; nothing is measured here."""
