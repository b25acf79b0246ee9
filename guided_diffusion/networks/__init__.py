"""Parts of the networks: blocks, attention and fused operations, compiling, and the flags that weights imply.

A new block goes into blocks.py; the networks themselves are in ../unet.py.
"""
