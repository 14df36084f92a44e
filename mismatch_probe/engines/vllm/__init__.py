"""The rollout engine vLLM: the only folder that knows its insides."""
