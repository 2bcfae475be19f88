"""What experts that share an FFN have in common.

A file holds a function `name(width, experts, generator, *, options...) -> Formula`, whose formula takes `y` [..., N], what the FFN gives, `chosen`
int64 [..., k], -1 for none, and `weights` [..., k], and gives what all chosen experts make of y, [..., N]. It begins so that an expert of weight 1 is
the FFN.
"""
