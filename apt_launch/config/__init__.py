"""A run's config: composed, resolved, checked, typed."""
