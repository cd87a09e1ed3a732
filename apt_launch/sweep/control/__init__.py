"""A sweep after its launch."""
