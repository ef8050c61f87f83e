"""Judging a model: by playing games, and by its loss and answers on dialogues."""
