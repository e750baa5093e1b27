"""The operator: it reconciles TokaDeployment objects into StatefulSets of engine pods behind a Service."""

__version__ = "0.1.0"
