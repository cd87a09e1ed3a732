"""A sweep while it runs: a live page, and the same in the terminal."""
