"""What a training takes before it starts: steps, memory and disk."""
