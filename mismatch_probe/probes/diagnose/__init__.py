"""Is a gap numerics or a bug, and which one: signatures of faults compete for a table of log-probs."""
