"""Exports a checkpoint as a model that others can load."""
