"""What a 4-bit weight is: code levels, blocks and scales, and the bytes they are kept in. Readable torch, any device."""
