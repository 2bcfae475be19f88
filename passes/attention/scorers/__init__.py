"""How much attention a block of queries pays to a block of keys, estimated before it is computed. One file a scorer."""
