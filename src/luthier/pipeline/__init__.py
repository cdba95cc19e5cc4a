"""What a recipe's words mean, and running them in a row."""
