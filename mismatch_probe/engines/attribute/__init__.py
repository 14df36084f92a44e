"""What an attribution asks of the engines: the same tokens under one change after another, and their insides."""
