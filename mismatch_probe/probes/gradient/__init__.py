"""What the mismatch does to the policy gradient of a batch."""
