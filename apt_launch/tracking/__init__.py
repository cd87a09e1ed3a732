"""Projections of a run's record: W&B, TensorBoard, CSV."""
