"""`python -m kubectl_toka`, for a checkout that is not installed."""

from __future__ import annotations

from kubectl_toka.main import main

main()
