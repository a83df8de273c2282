"""The benchmarks themselves: a module each, with `measure`, `summary` and `section`."""
