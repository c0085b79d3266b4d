"""Benchmarks: `python -m benchmarks.conv`, from a clone in which `make build` has run."""
