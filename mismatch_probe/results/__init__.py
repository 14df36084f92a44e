"""The documents that commands write and reports show: typed, versioned, readable without an engine."""
