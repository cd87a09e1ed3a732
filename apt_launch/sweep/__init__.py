"""Sweeps: planned, frozen, sent, followed, resumed, cancelled and reported."""
