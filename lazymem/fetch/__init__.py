"""What is wanted, what is in flight, what to guess next."""
