"""What `bench_zones` measures: cases, contenders, checks, targets and plots."""
