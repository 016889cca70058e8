"""What benchmarks/gpu.py measures, one module for each kind of stage.

A stage is a function `stage(context) -> dict` of what it measured, as JSON takes it; `in_words` of it is its line. To
add one: write the function, and add its row to STAGES in benchmarks/gpu.py.
"""
