"""The command line and the memory planner."""
