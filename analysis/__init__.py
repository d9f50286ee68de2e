"""Instruments: what registers and merging do to a Vision Transformer. They import the core, never the reverse."""
