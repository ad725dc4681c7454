"""The command line: one module per group of commands.

It may import every other subpackage except `builtin`, whose plugins it finds through the registry.
"""
