"""What scores the experts of a row: one file a router."""
