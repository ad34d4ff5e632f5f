"""Logits that are not computed until something reads them."""
