"""The model worker process: weights, forward steps, attention backends, sampling. Never loads the web framework."""
