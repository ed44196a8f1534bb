"""Speed and memory: scripts, run as `python benchmarks/NAME.py`."""
