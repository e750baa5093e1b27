"""The status page at `/`: what the engine does now and did in the last ten minutes, batches, and a playground."""
