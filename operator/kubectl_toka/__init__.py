"""`kubectl toka`: what people ask of TokaDeployments, as a plugin of kubectl.

Owns: the commands and what they print. It asks the cluster through kubectl itself, so that whatever logs a user in logs
the plugin in, and it needs nothing but Python. It imports neither the operator nor the engine; what it knows of them is
in `names`.
"""
