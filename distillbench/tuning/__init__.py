"""The search of methods' settings on equal terms: ``distillbench tune``."""
