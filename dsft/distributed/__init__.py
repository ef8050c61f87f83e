"""This process among the others of its run."""
