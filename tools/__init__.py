"""What measures and tests fxsparse: benchmarks, mask recipes; not in the wheel."""
