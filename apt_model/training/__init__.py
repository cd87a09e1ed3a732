"""The training loop and what it needs: callbacks, checkpoints, optimizer."""
