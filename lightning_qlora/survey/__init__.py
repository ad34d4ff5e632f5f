"""What is known of a module."""
