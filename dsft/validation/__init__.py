"""Evaluation of models: success in games, loss and answers on dialogues."""
