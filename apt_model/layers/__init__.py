"""The decoder's parts, one idea a file."""
