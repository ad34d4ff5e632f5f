"""The experts of one parameter as one layer."""
