"""Workers as actors of a Ray cluster (extra `ray`)."""
