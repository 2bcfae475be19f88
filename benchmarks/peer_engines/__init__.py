"""One file an engine: forms(folder, threads) yields (name, dtype, call), or (name, why it cannot run). No file imports another's library."""
