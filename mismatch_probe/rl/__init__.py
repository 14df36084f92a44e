"""Reinforcement learning with both engines: what the mismatch does to training."""
