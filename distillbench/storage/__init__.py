"""Files: written atomically, checksummed, locked, and read without running code.

It may import `system` and below.
"""
