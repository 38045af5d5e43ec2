"""The modules of a network as operations: linears, norms, attention, feed-forward, losses."""
