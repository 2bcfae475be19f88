"""What experts that cost nothing share.

One is a function `name(evidence) -> Formula or None` in a file of its own, whose formula takes `x` [..., K], what the FFN reads, and gives what the
expert does, [..., N]; None for nothing at all: then the weights of a row are those of the others that it chose. No kernel sees such an expert.
"""
