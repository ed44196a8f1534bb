"""The stages of accelerator.py, one file each: `run(stage, args)` measures and keeps a row at a time."""
