"""What policies cost in quality and save in active experts, measured on the real engine."""
