"""What structured sparsity saves on the clock, beside the dense operation: `python -m benchmarks`."""
