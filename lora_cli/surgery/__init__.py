"""What can be done: the plan, the engine, and one module per operation."""
