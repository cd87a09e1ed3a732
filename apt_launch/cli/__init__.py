"""The command line's own pages: help and completion."""
