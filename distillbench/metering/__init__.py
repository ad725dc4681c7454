"""How time, memory and energy are measured.

It may import `storage` and below.
"""
