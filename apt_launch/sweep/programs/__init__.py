"""Programs with ``@hydra.main`` that know nothing of this package: their configs frozen, and run again in jobs."""
