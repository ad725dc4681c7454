"""Teachers, datasets and metrics that ship with distillbench: plugins like any other, found by their entry points."""
