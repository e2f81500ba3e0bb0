"""Tensors on disk: strict header parser, shards and index, positioned reads, durable writes, the Hub."""
