"""What a sweep does: jobs composed, expanded, without duplicates, frozen."""
