"""What an adapter says: kinds of delta, names, patterns, inits, and one module per file format."""
