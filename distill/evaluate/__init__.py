"""How good a student is beside its teacher: `metrics` are the numbers, `judge` runs both, `picture` shows them."""
