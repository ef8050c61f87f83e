"""What can be wrong with a run before its first step. Nothing here imports torch."""
