"""Other orders of the tokens of an attention, in which what is read together lies in one block. One file an order.

An order is a function `name(query, key, key_mask, grid, scale, *, options) -> Order` in a file of its own, called as scorers are.
"""
