"""Quality of a model: run as `python -m evals.NAME`."""
