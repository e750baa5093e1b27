"""Grammars of structured output: their sources, their compilation by llguidance, and the process that tries each first.

Only `source` may be imported by the server and the manager: a client's text never meets the library in their processes.
"""
