"""What training will see of the data."""
