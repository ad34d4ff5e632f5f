"""In which type a dense module computes."""
