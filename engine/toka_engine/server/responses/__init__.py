"""The parts of `/v1/responses` beside its endpoint: input, items and events, tools, and the store."""
