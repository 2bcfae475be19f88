"""From the scores of pairs of blocks to the pairs that are read. One file a selector."""
