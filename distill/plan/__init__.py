"""What a run costs: memory, FLOP and time, before it starts."""
