"""May this model go into RL? From a comparison and measurements on the model itself to a verdict."""
