"""Files that are complete or absent, checksummed, locked, and read without running code.

It may import `system` and below.
"""
