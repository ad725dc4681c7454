"""The command line: one module per group of commands.

It may import every other subpackage.
"""
