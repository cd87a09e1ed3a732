"""A curriculum before it runs."""
