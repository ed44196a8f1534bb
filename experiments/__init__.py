"""What noise does to a real model: run as `python -m experiments.NAME`."""
