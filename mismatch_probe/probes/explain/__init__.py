"""What logged metrics say of the mismatch, without tokens. Sizes, courses and what fits together; no diagnosis."""
