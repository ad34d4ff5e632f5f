"""What a module becomes, with its report."""
