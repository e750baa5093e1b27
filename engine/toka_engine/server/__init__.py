"""The HTTP server process: OpenAI-compatible routes, tokenisation, streams. Never loads torch or
transformers.
"""
