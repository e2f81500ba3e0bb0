"""Pure tensor mathematics, no files: the scale, the exact product, the single rounding, the ordered line.

Nothing is imported here, so that `lora_cli.arithmetic.scale` can be used before torch is loaded.
"""

ARITHMETIC = 1
"""Version of the arithmetic. Another one gives other bytes for some merge, or reads undo files in another way."""
