"""transformers models and bitsandbytes folders."""
