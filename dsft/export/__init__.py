"""From a checkpoint to a model that others can load."""
