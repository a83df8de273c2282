"""What all benchmarks share: running children, the machine, peers' environments, result files."""
