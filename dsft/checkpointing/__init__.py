"""Checkpoints: what is on disk, how it gets there, and the proof that it is whole."""
