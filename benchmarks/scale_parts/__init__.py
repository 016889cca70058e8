"""The parts of benchmarks/scale.py: assumptions, the planned run, order, storage, failures, page and charts."""
