"""Small valid documents, changed by keyword."""
