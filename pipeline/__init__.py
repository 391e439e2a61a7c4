"""Conditional score-based diffusion: a prompt in, a picture drawn from p(x | u) out."""
