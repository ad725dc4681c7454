"""The contract of a frozen teacher, with its latents, encoded prompts and diffusers schedulers.

It may import `networks`, `datasets` and below.
"""
