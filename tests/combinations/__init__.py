"""All combinations of replicas and ranks on CPUs: a tier that runs only when it is named."""
