"""What stands for the blocks of keys that an attention does not read. One file a way.

It is a function `name(query, key, value, key_mask, left, grid, scale, *, options) -> (out, lse)` in a file of its own: query [B, H, Q, D], key and
value [B, G, K, ...], key_mask bool [B, K] or None (keys that count), left bool [B or 1, H, G or 1, NQ, NK], the pairs of blocks that lie wholly
before the diagonal and are not read. out [B, H, Q, E] and lse [B, H, Q], 0 and -inf in a row with nothing left, are merged with attention to what is
read.
"""
