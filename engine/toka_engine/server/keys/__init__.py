"""API keys: their file, who sent a request, what each key may use, and what it has used."""
