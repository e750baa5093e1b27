"""Large requests are made ready in a process of their own, whose code this is."""
