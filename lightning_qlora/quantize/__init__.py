"""What a 4-bit weight is: code levels, blocks and scales, and the bytes that hold them. Readable torch, any device."""
