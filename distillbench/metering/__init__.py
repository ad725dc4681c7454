"""How time, memory and energy are measured.

It may import `system` and `storage`.
"""
